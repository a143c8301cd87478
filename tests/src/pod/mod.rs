//! What runs in the pods of a world: a server that says who it is, clients that say what they saw.
//!
//! Every client prints one JSON value, so that a case compares facts and does not parse prose. Clients are processes
//! of their own because the cgroup decides whether a socket is translated at connect time.

pub mod bulk;
pub mod frame;
pub mod hold;
pub mod pieces;
pub mod ping;
pub mod probe;
pub mod sctp;
pub mod serve;
pub mod socket;
pub mod storm;
pub mod survey;
pub mod talk;
pub mod wire;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "testpod", about = "Server and clients for the pods of a test world")]
enum Command {
    /// Answer on TCP, UDP and SCTP, one line of JSON for each line or datagram
    Serve(serve::Args),
    /// Ask a few times and print what happened each time
    Probe(probe::Args),
    /// Ask what a list on stdin says, all at one time, and print what happened
    Survey(survey::Args),
    /// Keep connections open and in use until stdin closes; print what broke
    Hold(hold::Args),
    /// Send and receive megabytes over one TCP connection and compare every byte
    Bulk(bulk::Args),
    /// Send one Ethernet frame with a TCP SYN, with or without a VLAN tag; print what came back
    Frame(frame::Args),
    /// Send a datagram in fragments, the last one first; print what came back
    Pieces(pieces::Args),
    /// Connect at a steady rate until stdin closes; print failures and who answered
    Storm(storm::Args),
    /// Talk from one port until stdin closes; print who answered when
    Talk(talk::Args),
}

pub fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Serve(args) => serve::run(&args),
        Command::Probe(args) => probe::run(&args).and_then(|report| print(&report)),
        Command::Survey(args) => survey::run(&args).and_then(|reports| print(&reports)),
        Command::Hold(args) => hold::run(&args).and_then(|report| print(&report)),
        Command::Bulk(args) => bulk::run(&args).and_then(|report| print(&report)),
        Command::Frame(args) => frame::run(&args).and_then(|report| print(&report)),
        Command::Pieces(args) => pieces::run(&args).and_then(|report| print(&report)),
        Command::Storm(args) => storm::run(&args).and_then(|report| print(&report)),
        Command::Talk(args) => talk::run(&args).and_then(|report| print(&report)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testpod: {error:#}");
            ExitCode::from(3)
        }
    }
}

fn print(report: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(report)?);
    Ok(())
}

/// Becomes true once stdin is closed: how the parent ends a long-running client.
fn stop_on_stdin_eof() -> std::sync::Arc<std::sync::atomic::AtomicBool> {
    use std::{
        io::Read,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
    };

    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    std::thread::spawn(move || {
        let mut sink = Vec::new();
        // An unreadable stdin means that nobody is there to stop us: the same as closed.
        let _ = std::io::stdin().read_to_end(&mut sink);
        seen.store(true, Ordering::Relaxed);
    });
    stop
}
