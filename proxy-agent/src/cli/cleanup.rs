//! `cleanup`: removes everything of ours from the kernel. Idempotent.

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
    dataplane::ebpf::{Ebpf, read::Pins},
};

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Directory of the pinned maps and programs
    #[arg(long, value_name = "DIR", default_value = BPFFS, env = "PROXY_AGENT_BPFFS")]
    bpffs: PathBuf,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args { bpffs, dry_run } = args;
    if let Ok(pins) = Pins::open(&bpffs)
        && pins.agent_running()
    {
        // It would put back at once what is removed under it.
        let pid = pins.agent_pid().map(|pid| format!(" (pid {pid})")).unwrap_or_default();
        bail!("an agent runs on {}{pid}: stop it first", bpffs.display());
    }
    let found = pinned(&bpffs).with_context(|| format!("reading {}", bpffs.display()))?;
    if !dry_run {
        Ebpf::remove(&bpffs)?;
    }
    if found.is_empty() {
        writeln!(out, "{}: nothing is pinned here", bpffs.display())?;
    }
    for path in &found {
        writeln!(out, "{} {}", if dry_run { "would remove" } else { "removed" }, path.display())?;
    }
    let left =
        if dry_run { Vec::new() } else { pinned(&bpffs).with_context(|| format!("reading {}", bpffs.display()))? };
    if let Some(path) = left.first() {
        bail!("{} of {} pins are still there, {} among them", left.len(), found.len(), path.display());
    }
    Ok(Exit::Done)
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
