//! Settings of the whole machine that a kubelet changes: each node has copies in their place, so that they stay as they are.

use std::{fs, path::Path};

use anyhow::{Context, Result};

/// pkg/kubelet/cm/container_manager_linux.go, `setupKernelTunables`.
const SETTINGS: [&str; 6] = [
    "vm.overcommit_memory",
    "vm.panic_on_oom",
    "kernel.panic",
    "kernel.panic_on_oops",
    "kernel.keys.root_maxkeys",
    "kernel.keys.root_maxbytes",
];

/// Files by their names, to be mounted over those below `/proc/sys`.
pub(super) fn copy_settings(to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
    for setting in SETTINGS {
        let path = format!("/proc/sys/{}", setting.replace('.', "/"));
        let value = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        fs::write(to.join(setting), value).with_context(|| format!("copy {path} to {}", to.display()))?;
    }
    Ok(())
}
