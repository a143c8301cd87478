//! `cleanup`: removes everything of ours from the kernel, whichever dataplane made it, and on request what kube-proxy left. Idempotent.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::Args as ClapArgs;

use super::Exit;
use crate::{
    config::BPFFS,
    dataplane::{
        ebpf::{Ebpf, read::Pins},
        iptables::Iptables,
        ipvs::Ipvs,
        nftables::Nftables,
    },
};

pub(super) mod kube_proxy;

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Directory of the pinned maps and programs
    #[arg(long, value_name = "DIR", default_value = BPFFS, env = "PROXY_AGENT_BPFFS")]
    bpffs: PathBuf,
    /// Also remove what kube-proxy left: its tables of nftables, its chains in those of iptables, virtual servers, device and sets of its
    /// IPVS mode
    #[arg(long)]
    kube_proxy: bool,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
}

impl Args {
    /// What kube-proxy's `--cleanup` is expected to do: ours, and kube-proxy's.
    pub fn everything(bpffs: PathBuf) -> Self {
        Self { bpffs, kube_proxy: true, dry_run: false }
    }
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args { bpffs, kube_proxy, dry_run } = args;
    if let Ok(pins) = Pins::open(&bpffs)
        && pins.agent_running()
    {
        // It would put back at once what is removed under it.
        let pid = pins.agent_pid().map(|pid| format!(" (pid {pid})")).unwrap_or_default();
        bail!("an agent runs on {}{pid}: stop it first", bpffs.display());
    }
    let done = if dry_run { "would remove" } else { "removed" };
    let reading = || format!("reading {}", bpffs.display());
    let found = pinned(&bpffs).with_context(reading)?;
    let (tables, (chains, unknown), servers) = (Nftables::remains()?, Iptables::remains(), Ipvs::remains()?);
    // First of all, since it is refused where an agent is at work on them.
    if !tables.is_empty() && !dry_run {
        Nftables::remove()?;
    }
    if !chains.is_empty() && !dry_run {
        // What there is goes; what nobody can see is said at the end.
        let removed = Iptables::remove();
        if unknown.is_none() {
            removed?;
        }
    }
    if !servers.is_empty() && !dry_run {
        Ipvs::remove()?;
    }
    for rules in tables.iter().chain(&chains).chain(&servers) {
        writeln!(out, "{done} {rules}")?;
    }
    if !dry_run {
        Ebpf::remove(&bpffs)?;
    }
    if found.is_empty() {
        writeln!(out, "{}: nothing is pinned here", bpffs.display())?;
    }
    for path in &found {
        writeln!(out, "{done} {}", path.display())?;
    }
    let left = if dry_run { Vec::new() } else { pinned(&bpffs).with_context(reading)? };
    if let Some(path) = left.first() {
        bail!("{} of {} pins are still there, {} among them", left.len(), found.len(), path.display());
    }
    if kube_proxy {
        of_kube_proxy(dry_run, done, out)?;
    }
    match unknown {
        Some(unknown) => bail!(unknown),
        None => Ok(Exit::Done),
    }
}

/// One that runs puts back what is taken from it; that shows at the end.
fn of_kube_proxy(dry_run: bool, done: &str, out: &mut dyn Write) -> anyhow::Result<()> {
    let found = kube_proxy::find()?;
    if found.is_empty() {
        writeln!(out, "no rules of kube-proxy")?;
    }
    for remains in &found {
        if !dry_run {
            remains.remove()?;
        }
        writeln!(out, "{done} {}", remains.what)?;
    }
    if !dry_run && let Some(again) = kube_proxy::find()?.first() {
        bail!("{} is there again: does kube-proxy still run here?", again.what);
    }
    Ok(())
}

/// Everything pinned below `dir`, sorted; nothing where there is no such directory.
fn pinned(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(pinned(&entry.path())?);
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_found_at_any_depth_and_an_absent_directory_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(pinned(&dir.path().join("absent")).unwrap(), Vec::<PathBuf>::new());
        let maps = dir.path().join("v1/maps");
        fs::create_dir_all(&maps).unwrap();
        fs::write(maps.join("names"), "").unwrap();
        fs::write(maps.join("meta"), "").unwrap();
        assert_eq!(pinned(dir.path()).unwrap(), [maps.join("meta"), maps.join("names")]);
    }
}
