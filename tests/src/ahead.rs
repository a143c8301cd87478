//! Going first on a machine that has other things to do.

use nix::libc;

/// While it lives this thread, and what it starts, goes ahead of whatever else runs: else waiting for a CPU is what is
/// measured. Where that is refused the figures tell.
#[derive(Debug)]
pub struct Ahead(());

impl Ahead {
    pub fn of_others() -> Self {
        schedule(libc::SCHED_FIFO, 1);
        Self(())
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        schedule(libc::SCHED_OTHER, 0);
    }
}

fn schedule(policy: i32, priority: i32) {
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: this thread, and a parameter that lives through the call.
    let _ = unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
}
