//! How a command ends.

use std::{io, process::ExitCode};

/// Exit status; an interface (docs/cli.md).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    /// The thing asked for does not hold.
    DoesNotHold = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// It could not be done; the reason is on stderr.
    Failed = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A command line that parses and still makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// What an error means for the exit status. A reader that left (`| head`) has what it wanted: nothing went wrong.
pub fn of_error(error: &anyhow::Error) -> Exit {
    let broken_pipe = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    if error.chain().filter_map(|cause| cause.downcast_ref()).any(broken_pipe) {
        Exit::Done
    } else if error.chain().any(|cause| cause.is::<UsageError>()) {
        Exit::Usage
    } else {
        Exit::Failed
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn errors_map_to_exit_statuses() {
        let pipe = Err::<(), _>(io::Error::from(io::ErrorKind::BrokenPipe)).context("printing").unwrap_err();
        assert_eq!(of_error(&pipe), Exit::Done);
        assert_eq!(of_error(&anyhow!(UsageError("--sort-by X".into()))), Exit::Usage);
        assert_eq!(of_error(&anyhow!("no pins")), Exit::Failed);
        let statuses = [Exit::Done, Exit::DoesNotHold, Exit::Usage, Exit::Failed].map(|exit| exit as u8);
        assert_eq!(statuses, [0, 1, 2, 3]);
    }
}
