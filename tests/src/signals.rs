//! What is done before a signal ends this process.

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};

/// From here on SIGINT, SIGTERM and SIGHUP have `tidy` done and end the process with the status that it gives. Call it before any thread is
/// started: threads inherit that the signals are blocked, a thread of its own takes them.
pub fn before_they_end_us(tidy: impl FnOnce() -> i32 + Send + 'static) -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("block signals")?;
    std::thread::spawn(move || {
        let Ok(_) = signals.wait() else { return };
        std::process::exit(tidy());
    });
    Ok(())
}
