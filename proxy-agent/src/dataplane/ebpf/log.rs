//! Debug lines of the programs, on request (`--ebpf-log-level`).

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::unix::AsyncFd;

/// Prints what the programs log for as long as this process lives.
pub(crate) fn drain(ebpf: &mut Ebpf) {
    let logger = match EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::warn!(%error, "the programs' log cannot be read");
            return;
        }
    };
    let Ok(runtime) = tokio::runtime::Handle::try_current() else {
        tracing::warn!("the programs' log is not read: no runtime here");
        return;
    };
    runtime.spawn(async move {
        // SAFETY: the logger owns the descriptor it reports, always the same one, and moves into the `AsyncFd`.
        let Ok(mut logger) = (unsafe { AsyncFd::register(logger) }) else { return };
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
}
