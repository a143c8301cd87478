//! podman(1) with a storage of its own: no image and no container of it reaches the machine's, and what it holds is gone with its directory.
//! (That it has seen layers it notes in /var/lib/containers/cache, wherever its storage is.)

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// What it would take out of the machine's own configuration. Locks in files: those in shared memory have one name for everybody.
const CONFIGURATION: &str = "[containers]\nlog_driver = \"k8s-file\"\n\
    [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nlock_type = \"file\"\nruntime = \"crun\"\n";

pub struct Podman {
    directory: PathBuf,
    configuration: PathBuf,
}

impl Podman {
    pub fn new(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        let configuration = directory.join("containers.conf");
        fs::write(&configuration, CONFIGURATION).with_context(|| format!("write {}", configuration.display()))?;
        Ok(Self { directory: directory.to_owned(), configuration })
    }

    /// Variables that it wants.
    pub fn variables(&self) -> [(&'static str, OsString); 2] {
        [
            ("CONTAINERS_CONF", self.configuration.clone().into()),
            // Every other storage driver asks more of the filesystem below.
            ("STORAGE_DRIVER", "vfs".into()),
        ]
    }

    /// Arguments before its verb.
    pub fn arguments(&self) -> Vec<OsString> {
        let named = |option: &str, name: &str| {
            let mut argument = OsString::from(format!("--{option}="));
            argument.push(self.directory.join(name));
            argument
        };
        vec![
            named("root", "root"),
            named("runroot", "run"),
            named("tmpdir", "tmp"),
            named("network-config-dir", "networks"),
            "--storage-driver=vfs".into(),
        ]
    }
}
