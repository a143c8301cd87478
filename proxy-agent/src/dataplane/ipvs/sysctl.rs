//! Settings of the kernel's that IPVS needs, and what they were before.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File},
    io,
    path::PathBuf,
};

use crate::dataplane::netfilter::settings;

/// Below `net/ipv4`, and what each must be.
const WANTED: [(&str, &str); 5] = [
    // Answers are routed on.
    (FORWARDING, "1"),
    // Without it nothing that IPVS translates can be masqueraded.
    ("vs/conntrack", "1"),
    // What leads to a backend that is gone begins anew, and so does who was remembered there.
    ("vs/expire_nodest_conn", "1"),
    ("vs/expire_quiescent_template", "1"),
    // A port that is used again is a new connection.
    ("vs/conn_reuse_mode", "1"),
];

/// Pods need it whoever serves Services, and who else has switched it on does not show: it stays as it is (as with kube-proxy).
const FORWARDING: &str = "ip_forward";

/// Below which all of IPVS' are.
const OF_IPVS: &str = "vs";

/// What one that is missing needs. Where none of IPVS' is there it is none of theirs that is missing.
fn needs(name: &str, any_of_ipvs: bool) -> &'static str {
    match name {
        "vs/conntrack" if any_of_ipvs => "use a kernel that has CONFIG_IP_VS_NFCT",
        "vs/conn_reuse_mode" if any_of_ipvs => "use Linux 4.1 or later",
        "vs/expire_nodest_conn" | "vs/expire_quiescent_template" if any_of_ipvs => {
            "use a kernel whose IPVS has it (CONFIG_IP_VS)"
        }
        FORWARDING => "use a kernel that has CONFIG_INET, and a /proc/sys/net that is of this network namespace",
        _ => {
            "`modprobe ip_vs`, and a /proc/sys/net that is of this network namespace, which the node's own user namespace owns"
        }
    }
}

/// What is written on the device stands behind this.
const BEFORE: &str = "before: ";

/// Those below a directory.
#[derive(Debug)]
pub(super) struct Settings(PathBuf);

/// One that cannot be set.
#[derive(Debug, thiserror::Error)]
#[error("{}; {}", self.what(), self.remedy())]
pub(super) struct Unset {
    name: &'static str,
    error: io::Error,
    /// There are settings of IPVS'.
    any_of_ipvs: bool,
}

impl Unset {
    pub(super) fn what(&self) -> String {
        format!("net/ipv4/{} cannot be set: {}", self.name, self.error)
    }

    pub(super) fn remedy(&self) -> &'static str {
        if self.error.kind() == io::ErrorKind::NotFound {
            needs(self.name, self.any_of_ipvs)
        } else {
            "mount the node's /proc/sys/net into the container, writable (manifests/overlays/ipvs), or set it to 1 on the node"
        }
    }
}

impl Settings {
    /// Of the network namespace of the thread that asks.
    pub(super) fn here() -> Self {
        Self(settings::directory().join("ipv4"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn read(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.path(name)).map(|text| text.trim().to_owned())
    }

    /// As they are now, to be written on the device.
    pub(super) fn note(&self) -> io::Result<String> {
        let mut text = BEFORE.to_owned();
        for (name, _) in WANTED.into_iter().filter(|(name, _)| *name != FORWARDING) {
            let _ = write!(text, "{name}={} ", self.read(name)?);
        }
        Ok(text.trim_end().to_owned())
    }

    /// Whether this is what [`Settings::note`] wrote.
    pub(super) fn is_note(text: &str) -> bool {
        text.starts_with(BEFORE)
    }

    /// Those that are not as they must be.
    pub(super) fn wrong(&self) -> Vec<&'static str> {
        let wrong = WANTED.into_iter().filter(|(name, wanted)| !self.read(name).is_ok_and(|value| value == *wanted));
        wrong.map(|(name, _)| name).collect()
    }

    /// Whether those can be set that have to be. None is.
    pub(super) fn try_out(&self) -> Result<(), Unset> {
        for name in self.wrong() {
            File::options().write(true).open(self.path(name)).map_err(|error| self.unset(name, error))?;
        }
        Ok(())
    }

    fn unset(&self, name: &'static str, error: io::Error) -> Unset {
        Unset { name, error, any_of_ipvs: self.path(OF_IPVS).exists() }
    }

    /// How many were written.
    pub(super) fn set(&self) -> Result<u64, Unset> {
        let wrong = self.wrong();
        for (name, wanted) in WANTED.into_iter().filter(|(name, _)| wrong.contains(name)) {
            fs::write(self.path(name), wanted).map_err(|error| self.unset(name, error))?;
        }
        Ok(wrong.len() as u64)
    }

    /// Puts back what was noted. What somebody else has set meanwhile stays.
    pub(super) fn restore(&self, note: &str) -> io::Result<()> {
        let before: BTreeMap<&str, &str> = note
            .strip_prefix(BEFORE)
            .into_iter()
            .flat_map(|note| note.split(' '))
            .filter_map(|one| one.split_once('='))
            .collect();
        for (name, wanted) in WANTED.into_iter().filter(|(name, _)| *name != FORWARDING) {
            if let Some(value) = before.get(name).filter(|value| **value != wanted)
                && self.read(name).is_ok_and(|value| value == wanted)
            {
                fs::write(self.path(name), value)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_before_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("vs")).unwrap();
        let settings = Settings(dir.path().to_owned());
        let write = |name: &str, value: &str| fs::write(dir.path().join(name), format!("{value}\n")).unwrap();
        for (name, value) in WANTED.map(|(name, _)| name).into_iter().zip(["0", "0", "0", "0", "2"]) {
            write(name, value);
        }
        settings.try_out().unwrap();
        let note = settings.note().unwrap();
        assert!(note.ends_with("vs/expire_quiescent_template=0 vs/conn_reuse_mode=2") && note.len() < 256, "{note}");
        assert_eq!(settings.set().unwrap(), 5);
        assert!(settings.wrong().is_empty());
        assert_eq!(settings.set().unwrap(), 0);
        write("vs/expire_nodest_conn", "7");
        assert_eq!(settings.wrong(), ["vs/expire_nodest_conn"]);
        settings.restore(&note).unwrap();
        assert_eq!(settings.note().unwrap(), note.replace("nodest_conn=0", "nodest_conn=7"), "somebody else's stays");
        assert_eq!(settings.read(FORWARDING).unwrap(), "1", "pods need it");
        // An earlier version noted it.
        settings.restore("before: ip_forward=0").unwrap();
        assert_eq!(settings.read(FORWARDING).unwrap(), "1");
        settings.restore("what somebody else wrote there").unwrap();
        fs::remove_file(dir.path().join("vs/conntrack")).unwrap();
        assert!(settings.note().is_err() && settings.wrong().contains(&"vs/conntrack"));
    }

    #[test]
    fn what_cannot_be_set_is_found_without_setting_anything() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("vs")).unwrap();
        let settings = Settings(dir.path().to_owned());
        for (name, _) in WANTED {
            fs::write(settings.path(name), "0").unwrap();
        }
        // Nobody can write that, root included.
        let name = "vs/expire_nodest_conn";
        fs::remove_file(settings.path(name)).unwrap();
        fs::create_dir(settings.path(name)).unwrap();
        let tried = settings.try_out().unwrap_err().to_string();
        assert!(tried.starts_with("net/ipv4/vs/expire_nodest_conn cannot be set: "), "{tried}");
        assert!(tried.ends_with("or set it to 1 on the node"), "{tried}");
        for (other, _) in WANTED.into_iter().filter(|(other, _)| *other != name) {
            assert_eq!(settings.read(other).unwrap(), "0", "{other}");
        }
        assert_eq!(settings.set().unwrap_err().to_string(), tried);
        fs::remove_dir(settings.path(name)).unwrap();
        // Each says what it needs, and none what another one does.
        let absent = |name: &str| {
            for (other, _) in WANTED {
                fs::write(settings.path(other), "0").unwrap();
            }
            fs::remove_file(settings.path(name)).unwrap();
            settings.try_out().unwrap_err().to_string()
        };
        for (name, needs) in [
            ("vs/conntrack", "CONFIG_IP_VS_NFCT"),
            ("vs/conn_reuse_mode", "Linux 4.1"),
            (FORWARDING, "/proc/sys/net that is of this network namespace"),
            ("vs/expire_quiescent_template", "whose IPVS has it"),
            ("vs/expire_nodest_conn", "whose IPVS has it"),
        ] {
            let said = absent(name);
            assert!(said.starts_with(&format!("net/ipv4/{name} cannot")) && said.contains(needs), "{said}");
            assert_eq!(said.contains("NFCT"), name == "vs/conntrack", "{said}");
        }
        let away = dir.path().join("away");
        fs::rename(settings.path(OF_IPVS), &away).unwrap();
        let none = settings.try_out().unwrap_err().to_string();
        assert!(none.contains("vs/conntrack") && none.contains("modprobe ip_vs") && !none.contains("NFCT"), "{none}");
        fs::rename(&away, settings.path(OF_IPVS)).unwrap();
        // What is as it must be needs no leave.
        fs::write(settings.path(name), "1").unwrap();
        settings.set().unwrap();
        settings.try_out().unwrap();
    }
}
