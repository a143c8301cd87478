//! What the agent must be allowed, asked before it makes anything: a directory that an unprivileged start left in a bpffs would be
//! in the way of every later one.

use std::{io, os::unix::fs::MetadataExt, path::Path};

use anyhow::{Context, bail};
use rustix::{
    process::geteuid,
    thread::{CapabilitySet, capabilities},
};

use crate::dataplane::ebpf::probe::missing_capabilities;

/// Fails with all that is missing, and what to do.
pub(super) fn check(bpffs: &Path) -> anyhow::Result<()> {
    let held = capabilities(None).context("asking for the own capabilities")?.effective;
    let missing = missing(held, geteuid().as_raw(), owner(bpffs));
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "not allowed to run the datapath: {} missing; run as root, or in a container as uid 0 with the capabilities BPF, PERFMON \
         and NET_ADMIN",
        missing.join(", ")
    )
}

/// Who owns the directory, or what it would be made in.
fn owner(bpffs: &Path) -> Option<u32> {
    bpffs.ancestors().find_map(|path| match path.metadata() {
        Ok(metadata) => Some(Some(metadata.uid())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        // Not ours to look into; whoever may will say what is wrong with it.
        Err(_) => Some(None),
    })?
}

fn missing(held: CapabilitySet, uid: u32, owner: Option<u32>) -> Vec<String> {
    let mut missing: Vec<_> = missing_capabilities(held).map(str::to_owned).collect();
    if uid != 0 && owner == Some(0) && !held.contains(CapabilitySet::DAC_OVERRIDE) {
        missing.push(format!("uid 0 (it is {uid}, and the bpffs is root's)"));
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let all = CapabilitySet::BPF | CapabilitySet::PERFMON | CapabilitySet::NET_ADMIN;
        assert_eq!(missing(all, 0, Some(0)), Vec::<String>::new());
        assert_eq!(missing(CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN, 0, Some(0)), Vec::<String>::new());
        assert_eq!(missing(CapabilitySet::BPF, 7, Some(7)), ["CAP_PERFMON", "CAP_NET_ADMIN"]);
        assert_eq!(missing(all, 7, Some(0)), ["uid 0 (it is 7, and the bpffs is root's)"]);
    }
}
