//! Settings of the kernel's that IPVS needs, and what they were before.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File},
    io,
    path::PathBuf,
};

use crate::dataplane::netfilter::settings;

/// Below `net/ipv4`, and what it must be.
type Setting = (&'static str, &'static str);

const ALWAYS: [Setting; 4] = [
    // Answers are routed on.
    (FORWARDING, "1"),
    // Without it nothing that IPVS translates can be masqueraded.
    ("vs/conntrack", "1"),
    // What leads to a backend that is gone begins anew, and so does who was remembered there.
    ("vs/expire_nodest_conn", "1"),
    ("vs/expire_quiescent_template", "1"),
];

/// With 1, the kernel's default, who uses a port again waits for a second where conntrack is on: the first packet is dropped. That is mended
/// since Linux 5.9 (f0a5e4d7a594), and what stands is left as it is from there on (contract A154).
const REUSE: Setting = ("vs/conn_reuse_mode", "0");
const REUSE_MENDED: (u32, u32) = (5, 9);

/// No neighbour is told of addresses that are on another device than the one it asks by.
const STRICT_ARP: [Setting; 2] = [("conf/all/arp_ignore", "1"), ("conf/all/arp_announce", "2")];

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
        FORWARDING | "conf/all/arp_ignore" | "conf/all/arp_announce" => {
            "use a kernel that has CONFIG_INET, and a /proc/sys/net that is of this network namespace"
        }
        _ => {
            "`modprobe ip_vs`, and a /proc/sys/net that is of this network namespace, which the node's own user namespace owns"
        }
    }
}

/// What is written on the device stands behind this. The kernel takes 255 bytes there.
const BEFORE: &str = "before: ";

/// Those below a directory that have to be something.
#[derive(Debug)]
pub(super) struct Settings {
    directory: PathBuf,
    wanted: Vec<Setting>,
}

/// One that cannot be set.
#[derive(Debug, thiserror::Error)]
#[error("{}; {}", self.what(), self.remedy())]
pub(super) struct Unset {
    setting: Setting,
    error: io::Error,
    /// There are settings of IPVS'.
    any_of_ipvs: bool,
}

impl Unset {
    pub(super) fn what(&self) -> String {
        let (name, _) = self.setting;
        format!("net/ipv4/{name} cannot be set: {}", self.error)
    }

    pub(super) fn remedy(&self) -> String {
        let (name, wanted) = self.setting;
        if self.error.kind() == io::ErrorKind::NotFound {
            needs(name, self.any_of_ipvs).to_owned()
        } else {
            format!(
                "mount the node's /proc/sys/net into the container, writable (manifests/overlays/ipvs), or set it to {wanted} on the node"
            )
        }
    }
}

impl Settings {
    /// Of the network namespace of the thread that asks.
    pub(super) fn here() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        Self::below(settings::directory().join("ipv4"), version(&release))
    }

    fn below(directory: PathBuf, kernel: Option<(u32, u32)>) -> Self {
        let reuse = kernel.is_some_and(|kernel| kernel < REUSE_MENDED).then_some(REUSE);
        Self { directory, wanted: ALWAYS.into_iter().chain(reuse).collect() }
    }

    /// If that is asked for.
    pub(super) fn with_strict_arp(mut self, asked: bool) -> Self {
        self.wanted.extend(STRICT_ARP.into_iter().filter(|_| asked));
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn read(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.path(name)).map(|text| text.trim().to_owned())
    }

    /// As they are now, to be written on the device; what `before` says of some stands, for those have been set since.
    pub(super) fn note(&self, before: &str) -> io::Result<String> {
        let noted = noted(before);
        let mut text = if noted.is_empty() { BEFORE.trim_end().to_owned() } else { before.to_owned() };
        for (name, _) in self.wanted.iter().filter(|(name, _)| *name != FORWARDING && !noted.contains_key(name)) {
            let _ = write!(text, " {name}={}", self.read(name)?);
        }
        Ok(text)
    }

    /// What either note says of settings; of those that both name, what the first does.
    pub(super) fn either(note: &str, other: &str) -> String {
        let first = noted(note);
        let mut text = if first.is_empty() { BEFORE.trim_end().to_owned() } else { note.to_owned() };
        for (name, value) in noted(other).into_iter().filter(|(name, _)| !first.contains_key(name)) {
            let _ = write!(text, " {name}={value}");
        }
        text
    }

    /// Whether this is what [`Settings::note`] wrote.
    pub(super) fn is_note(text: &str) -> bool {
        text.starts_with(BEFORE)
    }

    /// Those that are not as they must be.
    pub(super) fn wrong(&self) -> Vec<&'static str> {
        self.all_wrong().map(|(name, _)| name).collect()
    }

    fn all_wrong(&self) -> impl Iterator<Item = Setting> {
        self.wanted.iter().copied().filter(|(name, wanted)| !self.read(name).is_ok_and(|value| value == *wanted))
    }

    /// Whether those can be set that have to be. None is.
    pub(super) fn try_out(&self) -> Result<(), Unset> {
        for setting in self.all_wrong() {
            let path = self.path(setting.0);
            File::options().write(true).open(path).map_err(|error| self.unset(setting, error))?;
        }
        Ok(())
    }

    fn unset(&self, setting: Setting, error: io::Error) -> Unset {
        Unset { setting, error, any_of_ipvs: self.path(OF_IPVS).exists() }
    }

    /// How many were written.
    pub(super) fn set(&self) -> Result<u64, Unset> {
        let wrong: Vec<Setting> = self.all_wrong().collect();
        for (name, wanted) in wrong.iter().copied() {
            fs::write(self.path(name), wanted).map_err(|error| self.unset((name, wanted), error))?;
        }
        Ok(wrong.len() as u64)
    }

    /// Puts back what was noted, whatever has to be set by now; the first thing that cannot be. What somebody else has set meanwhile stays.
    pub(super) fn restore(&self, note: &str) -> io::Result<()> {
        let before = noted(note);
        let all = ALWAYS.into_iter().chain([REUSE]).chain(STRICT_ARP);
        let mut restored = Ok(());
        for (name, wanted) in all.filter(|(name, _)| *name != FORWARDING) {
            if let Some(value) = before.get(name).filter(|value| **value != wanted)
                && self.read(name).is_ok_and(|value| value == wanted)
            {
                restored = restored.and(fs::write(self.path(name), value));
            }
        }
        restored
    }
}

/// What [`Settings::note`] wrote; of anything else nothing.
fn noted(note: &str) -> BTreeMap<&str, &str> {
    let all = note.strip_prefix(BEFORE).into_iter().flat_map(|note| note.split(' '));
    all.filter_map(|one| one.split_once('=')).collect()
}

/// Of a kernel's release. `None`: it is of none that was ever told apart.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_was_set_before_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let settings = all(dir.path());
        let write = |name: &str, value: &str| fs::write(dir.path().join(name), format!("{value}\n")).unwrap();
        for ((name, _), value) in settings.wanted.iter().zip(["0", "0", "0", "0", "1", "0", "1"]) {
            write(name, value);
        }
        settings.try_out().unwrap();
        let note = settings.note("").unwrap();
        assert_eq!(
            note,
            "before: vs/conntrack=0 vs/expire_nodest_conn=0 vs/expire_quiescent_template=0 vs/conn_reuse_mode=1 \
             conf/all/arp_ignore=0 conf/all/arp_announce=1"
        );
        // Numbers of the kernel's, as long as they come: more is no alias of a device.
        assert!(note.len() + settings.wanted.len() * "2147483647".len() < 256, "{note}");
        assert_eq!(settings.set().unwrap(), 7);
        assert!(settings.wrong().is_empty());
        assert_eq!(settings.set().unwrap(), 0);
        assert_eq!(settings.note(&note).unwrap(), note, "by now we have set it");
        write("vs/expire_nodest_conn", "7");
        assert_eq!(settings.wrong(), ["vs/expire_nodest_conn"]);
        // Whatever is asked for by then.
        Settings::below(dir.path().to_owned(), None).restore(&note).unwrap();
        let now = settings.note("").unwrap();
        assert_eq!(now, note.replace("nodest_conn=0", "nodest_conn=7"), "somebody else's stays");
        assert_eq!(settings.read(FORWARDING).unwrap(), "1", "pods need it");
        // An earlier version noted it.
        settings.restore("before: ip_forward=0").unwrap();
        assert_eq!(settings.read(FORWARDING).unwrap(), "1");
        settings.restore("what somebody else wrote there").unwrap();
        fs::remove_file(dir.path().join("vs/conntrack")).unwrap();
        assert!(settings.note("").is_err() && settings.wrong().contains(&"vs/conntrack"));
    }

    /// All that there may be.
    fn all(directory: &Path) -> Settings {
        for name in ["vs", "conf/all"] {
            fs::create_dir_all(directory.join(name)).unwrap();
        }
        Settings::below(directory.to_owned(), Some((5, 8))).with_strict_arp(true)
    }

    #[test]
    fn what_is_wanted_depends_on_the_kernel_and_on_who_asks_a154() {
        let names = |release: &str, strict| {
            let settings = Settings::below(PathBuf::new(), version(release)).with_strict_arp(strict);
            settings.wanted.into_iter().skip(ALWAYS.len()).collect::<Vec<_>>()
        };
        let [ignore, announce] = STRICT_ARP;
        for release in ["4.19.0-27-amd64", "5.8.18", "5.4", "3.10.0-1160.el7.x86_64"] {
            assert_eq!(names(release, false), [("vs/conn_reuse_mode", "0")], "{release}");
            assert_eq!(names(release, true), [REUSE, ignore, announce], "{release}");
        }
        for release in ["5.9.0-rc1+", "5.10.0-33-cloud-amd64", "6.18.5", "10.0", "unknown", ""] {
            assert_eq!(names(release, false), [], "{release}");
        }
        assert_eq!(names("6.1.0-18", true), [("conf/all/arp_ignore", "1"), ("conf/all/arp_announce", "2")]);
    }

    /// A start that asks for more finds the device of one that asked for less.
    #[test]
    fn what_is_asked_for_later_is_noted_before_it_is_set() {
        let dir = tempfile::tempdir().unwrap();
        let strict = all(dir.path());
        strict.wanted.iter().for_each(|(name, _)| fs::write(strict.path(name), "0").unwrap());
        let plain = Settings::below(dir.path().to_owned(), Some((6, 1)));
        let before = plain.note("").unwrap();
        plain.set().unwrap();
        assert_eq!(strict.read("conf/all/arp_ignore").unwrap(), "0");
        let note = strict.note(&before).unwrap();
        assert!(
            note.starts_with(&before) && note.ends_with(" conf/all/arp_ignore=0 conf/all/arp_announce=0"),
            "{note}"
        );
        strict.set().unwrap();
        assert_eq!(strict.read("conf/all/arp_announce").unwrap(), "2");
        plain.restore(&note).unwrap();
        assert_eq!(strict.note("").unwrap(), note);
    }

    #[test]
    fn what_cannot_be_set_is_found_without_setting_anything() {
        let dir = tempfile::tempdir().unwrap();
        let settings = all(dir.path());
        let all_are =
            |value: &str| settings.wanted.iter().for_each(|(name, _)| fs::write(settings.path(name), value).unwrap());
        all_are("9");
        // Nobody can write that, root included.
        let name = "vs/expire_nodest_conn";
        fs::remove_file(settings.path(name)).unwrap();
        fs::create_dir(settings.path(name)).unwrap();
        let tried = settings.try_out().unwrap_err().to_string();
        assert!(tried.starts_with("net/ipv4/vs/expire_nodest_conn cannot be set: "), "{tried}");
        assert!(tried.ends_with("or set it to 1 on the node"), "{tried}");
        for (other, _) in settings.wanted.iter().filter(|(other, _)| *other != name) {
            assert_eq!(settings.read(other).unwrap(), "9", "{other}");
        }
        assert_eq!(settings.set().unwrap_err().to_string(), tried);
        fs::remove_dir(settings.path(name)).unwrap();
        // Each says what it needs, and none what another one does.
        let absent = |name: &str| {
            all_are("9");
            fs::remove_file(settings.path(name)).unwrap();
            settings.try_out().unwrap_err().to_string()
        };
        for (name, needs) in [
            ("vs/conntrack", "CONFIG_IP_VS_NFCT"),
            ("vs/conn_reuse_mode", "Linux 4.1"),
            (FORWARDING, "/proc/sys/net that is of this network namespace"),
            ("conf/all/arp_announce", "/proc/sys/net that is of this network namespace"),
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
        // Each is to be set to its own.
        fs::remove_file(settings.path("conf/all/arp_announce")).unwrap();
        fs::create_dir(settings.path("conf/all/arp_announce")).unwrap();
        let tried = settings.try_out().unwrap_err().to_string();
        assert!(tried.ends_with("or set it to 2 on the node"), "{tried}");
    }
}
