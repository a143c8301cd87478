//! What the agent must be allowed, asked before it makes anything: a directory that an unprivileged start left in a bpffs would be
//! in the way of every later one.

use std::path::Path;

use anyhow::{Context, bail};
use rustix::thread::{CapabilitySet, capabilities};

use crate::dataplane::ebpf::probe::{missing_capabilities, not_its_own};

/// Fails with all that is missing, and what to do. Without pins netfilter's rules are all there is to write.
pub(super) fn check(bpffs: Option<&Path>) -> anyhow::Result<()> {
    let held = capabilities(None).context("asking for the own capabilities")?.effective;
    let Some(bpffs) = bpffs else {
        if held.contains(CapabilitySet::NET_ADMIN) {
            return Ok(());
        }
        bail!(
            "not allowed to write netfilter's rules: CAP_NET_ADMIN missing; run as root, or in a container with the capability NET_ADMIN"
        );
    };
    let missing = missing(held, not_its_own(bpffs));
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "not allowed to run the datapath: {} missing; run as root, or in a container as uid 0 with the capabilities BPF, PERFMON \
         and NET_ADMIN",
        missing.join(", ")
    )
}

/// `uid`: the own one, where the bpffs is another's.
fn missing(held: CapabilitySet, uid: Option<u32>) -> Vec<String> {
    let uid = uid.map(|uid| format!("uid 0 (it is {uid}, and the bpffs is root's)"));
    missing_capabilities(held).map(str::to_owned).chain(uid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let all = CapabilitySet::BPF | CapabilitySet::PERFMON | CapabilitySet::NET_ADMIN;
        assert_eq!(missing(all, None), Vec::<String>::new());
        assert_eq!(missing(CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN, None), Vec::<String>::new());
        assert_eq!(missing(CapabilitySet::BPF, None), ["CAP_PERFMON", "CAP_NET_ADMIN"]);
        assert_eq!(missing(all, Some(7)), ["uid 0 (it is 7, and the bpffs is root's)"]);
    }
}
