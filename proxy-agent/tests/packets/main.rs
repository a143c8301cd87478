//! The per-packet programs, packet in → packet out, through `BPF_PROG_TEST_RUN`. Needs root and the object; else skipped.

#[allow(dead_code, reason = "the connect-time tests use the rest")]
#[path = "../support/mod.rs"]
mod support;

mod affinity;
mod broken;
mod choice;
mod direct;
mod ended;
mod flows;
mod headers;
mod icmp;
mod local;
mod lost;
mod maglev;
mod meeting;
mod packet;
mod programs;
mod refuse;
mod sctp;
mod source_ranges;
mod sums;
mod table;
mod world;
mod xdp;
