//! `init`: what the agent needs of the node and may not do itself once it holds the least privileges.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::Args as ClapArgs;

use super::Exit;
use crate::{config::BPFFS, dataplane::ebpf};

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Directory of the pinned maps and programs
    #[arg(long, value_name = "DIR", default_value = BPFFS, env = "PROXY_AGENT_BPFFS")]
    bpffs: PathBuf,
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args { bpffs } = args;
    let (mounted, warning) = ebpf::mount_bpffs(&bpffs)?;
    let what = if mounted { "mounted for" } else { "is there already for" };
    writeln!(out, "bpffs {what} {}", bpffs.display())?;
    if let Some(warning) = warning {
        writeln!(io::stderr(), "warning: {warning}")?;
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_never_on_bpffs_is_refused_with_the_remedy() {
        let error = execute(Args { bpffs: "/proc/pins".into() }, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("/proc/pins is not on a bpf filesystem") && error.contains("--bpffs"), "{error}");
    }
}
