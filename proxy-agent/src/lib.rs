//! The agent: watches Services and EndpointSlices, plans, and keeps a dataplane in step.
//!
//! Floors; a module imports only what stands below it (a test holds this):
//!
//! ```text
//! main → cli → { serve, sync, dataplane::select, source, config }
//! sync → { plan, dataplane (the trait), node, status }          serve → status
//! plan → { model, desired }        dataplane::* → desired       status → desired
//! source, node, config → model     desired, ebpf maps → proxy-common ← proxy-ebpf
//! ```
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unreachable)
)]

/// The name that `tests/common` knows this crate by, for the unit tests that build their worlds with it, too.
#[cfg(test)]
extern crate self as proxy_agent;

pub mod cli;
pub mod config;
pub mod dataplane;
pub mod desired;
mod ipsec;
pub mod model;
pub mod node;
pub mod plan;
pub mod serve;
pub mod source;
pub mod status;
pub mod sync;
