//! Who is measured: the agent, and upstream's kube-proxy.

use std::{
    collections::BTreeSet,
    env, fs,
    fs::File,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use proxy_tests::ahead::Ahead;

use super::observer::Place;
use crate::{objects::NODE, world::Netns};

/// Which rules are written, and with which commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Nftables,
    IptablesNft,
    IptablesLegacy,
}

impl Mode {
    pub const ALL: [Self; 3] = [Self::Nftables, Self::IptablesLegacy, Self::IptablesNft];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::IptablesNft => "iptables (nft)",
            Self::IptablesLegacy => "iptables (legacy)",
        }
    }

    /// What stands where kube-proxy's commands have no name of a flavour.
    const fn flavour(self) -> &'static str {
        match self {
            Self::Nftables | Self::IptablesNft => "nft",
            Self::IptablesLegacy => "legacy",
        }
    }

    /// The command that writes rules, by the beginning of its name.
    pub const fn writes(self) -> &'static str {
        match self {
            Self::Nftables => "nft",
            Self::IptablesNft => "iptables-nft-restore",
            Self::IptablesLegacy => "iptables-legacy-restore",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    Agent,
    KubeProxy,
}

impl Who {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::KubeProxy => "kube-proxy",
        }
    }

    pub const fn place(self, mode: Mode) -> Place {
        match (self, mode) {
            (Self::Agent, Mode::Nftables) => Place::Elements { table: "proxy-agent", map: "tcp-endpoints" },
            (Self::KubeProxy, Mode::Nftables) => Place::Chains { table: "kube-proxy", map: "service-ips" },
            (_, Mode::IptablesNft) => Place::Rules { table: "nat" },
            (_, Mode::IptablesLegacy) => Place::Legacy { table: "nat" },
        }
    }
}

/// How often a subject looks by itself whether all is as it should.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Period {
    Default,
    Seconds(u32),
}

/// All that a start needs.
pub struct Start<'a> {
    pub who: Who,
    pub mode: Mode,
    pub period: Period,
    pub program: &'a Path,
    pub kubeconfig: &'a Path,
    pub netns: &'a Netns,
    /// Commands that it finds first.
    pub commands: &'a Path,
    pub cgroup: &'a Path,
    pub files: &'a Path,
    pub bpffs: &'a Path,
}

/// A running one; killed with all that it started when dropped. Its rules go with the namespace.
pub struct Subject {
    child: Child,
    cgroup: PathBuf,
    /// Processor time that the cgroup had used before.
    used: f64,
    log: PathBuf,
}

impl Start<'_> {
    pub fn spawn(&self) -> Result<Subject> {
        let Self { who, netns, program, cgroup, files, commands, .. } = self;
        let arguments = match who {
            Who::Agent => self.agent(),
            Who::KubeProxy => vec!["--config".to_owned(), self.configuration()?.display().to_string()],
        };
        let log = files.join(format!("{}.log", who.name()));
        let used = used(cgroup)?;
        let output = File::create(&log)?;
        let path = format!("{}:{}", commands.display(), env::var("PATH").unwrap_or_default());
        // Who measures and who is measured go first alike.
        let ahead = Ahead::of_others();
        let child = Command::new("sh")
            .args(["-c", "echo 0 > \"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"])
            .arg(cgroup)
            .arg("nsenter")
            .arg(format!("--net={}", netns.path().display()))
            .arg(program)
            .args(arguments)
            .env("PATH", path)
            // Other programs of this machine write rules, too.
            .env("XTABLES_LOCKFILE", files.join("xtables.lock"))
            .env_remove("KUBECONFIG")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn();
        drop(ahead);
        Ok(Subject { child: child.context("start sh")?, cgroup: cgroup.to_path_buf(), used, log })
    }

    fn agent(&self) -> Vec<String> {
        let Self { mode, period, kubeconfig, cgroup, bpffs, .. } = self;
        let path = |path: &Path| path.display().to_string();
        let mode: &[&str] = match mode {
            Mode::Nftables => &["--proxy-mode=nftables"],
            Mode::IptablesNft => &["--proxy-mode=iptables", "--iptables-flavour=nft"],
            Mode::IptablesLegacy => &["--proxy-mode=iptables", "--iptables-flavour=legacy"],
        };
        let mut arguments = vec!["run".to_owned(), format!("--hostname-override={NODE}")];
        arguments.extend(mode.iter().map(|&one| one.to_owned()));
        arguments.push(format!("--kubeconfig={}", path(kubeconfig)));
        arguments.push(format!("--bpffs={}", path(bpffs)));
        arguments.push(format!("--cgroup-root={}", path(cgroup)));
        if let Period::Seconds(seconds) = period {
            arguments.push(format!("--sync-period={seconds}s"));
        }
        arguments
    }

    /// What is not said is upstream's default: changes wait for each other a second, and nothing is masqueraded.
    fn configuration(&self) -> Result<PathBuf> {
        let Self { mode, period, kubeconfig, files, .. } = self;
        let (name, kubeconfig) = (if *mode == Mode::Nftables { "nftables" } else { "iptables" }, kubeconfig.display());
        let period = match period {
            Period::Default => String::new(),
            Period::Seconds(seconds) => format!("{name}: {{syncPeriod: {seconds}s}}\n"),
        };
        let path = files.join("kube-proxy.yaml");
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n\
             kind: KubeProxyConfiguration\n\
             mode: {name}\n\
             hostnameOverride: {NODE}\n\
             clientConnection: {{kubeconfig: {kubeconfig}}}\n\
             detectLocalMode: ClusterCIDR\n\
             clusterCIDR: \"\"\n\
             {period}\
             conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n"
        );
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

impl Subject {
    /// Processor time of all its processes so far, in milliseconds.
    pub fn cpu(&self) -> Result<f64> {
        Ok(used(&self.cgroup)? - self.used)
    }

    /// Its processes now.
    pub fn processes(&self) -> BTreeSet<u32> {
        let text = fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != self.child.id()).collect()
    }

    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("it ended: {status}"),
        }
    }

    /// What its log ends with.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let mut tail: Vec<_> = log.lines().rev().take(8).collect();
        tail.reverse();
        tail.join(" | ")
    }

    /// The most memory that it has had at a time, in MB; of another process of its, if one is named.
    pub fn memory(&self, pid: Option<u32>) -> Option<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", pid.unwrap_or(self.child.id()))).ok()?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        Some(peak?.trim().parse::<f64>().ok()? / 1e3)
    }
}

impl Drop for Subject {
    /// With what it has started.
    fn drop(&mut self) {
        if fs::write(self.cgroup.join("cgroup.kill"), "1").is_err() {
            let _gone = self.child.kill();
        }
        let _gone = self.child.wait();
    }
}

/// Milliseconds of processor time.
fn used(cgroup: &Path) -> Result<f64> {
    let text = fs::read_to_string(cgroup.join("cpu.stat"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    Ok(line.context("cpu.stat names no usage")?.trim().parse::<f64>()? / 1e3)
}

const TOOLS: [&str; 20] = [
    "nft",
    "conntrack",
    "iptables",
    "iptables-save",
    "iptables-restore",
    "ip6tables",
    "ip6tables-save",
    "ip6tables-restore",
    "iptables-nft",
    "iptables-nft-save",
    "iptables-nft-restore",
    "ip6tables-nft",
    "ip6tables-nft-save",
    "ip6tables-nft-restore",
    "iptables-legacy",
    "iptables-legacy-save",
    "iptables-legacy-restore",
    "ip6tables-legacy",
    "ip6tables-legacy-save",
    "ip6tables-legacy-restore",
];

/// A directory of the commands that a subject may start: of the mode's flavour; and, if asked for, each noting that it was started, with
/// what, and what it was told.
pub fn commands(directory: &Path, mode: Mode, notes: Option<&Path>) -> Result<()> {
    fs::create_dir_all(directory)?;
    for name in TOOLS {
        let flavoured = match name.split_once("tables") {
            Some((ip, rest)) if !rest.contains("nft") && !rest.contains("legacy") => {
                format!("{ip}tables-{}{rest}", mode.flavour())
            }
            _ => name.to_owned(),
        };
        let Some(real) = find(&flavoured) else { continue };
        let at = directory.join(name);
        match notes {
            None => symlink(real, at)?,
            Some(notes) => {
                let (real, notes) = (real.display(), notes.display());
                let script = format!(
                    "#!/bin/sh\necho \"$$ {flavoured} $*\" >> {notes}/calls\nexec tee {notes}/$$.in | exec {real} \"$@\"\n"
                );
                fs::write(&at, script)?;
                fs::set_permissions(&at, fs::Permissions::from_mode(0o755))?;
            }
        }
    }
    Ok(())
}

pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|at| at.exists())
}

/// One start of a command, as it was noted.
pub struct Call {
    pub command: String,
    pub arguments: Vec<String>,
    pub input: PathBuf,
}

/// The starts noted so far, in order.
pub fn calls(notes: &Path) -> Vec<Call> {
    let text = fs::read_to_string(notes.join("calls")).unwrap_or_default();
    let call = |line: &str| {
        let mut words = line.split(' ').map(str::to_owned);
        let pid = words.next()?;
        Some(Call { command: words.next()?, arguments: words.collect(), input: notes.join(format!("{pid}.in")) })
    };
    text.lines().filter_map(call).collect()
}

/// Sleeps so short that what is measured is not.
pub fn nap() {
    thread::sleep(Duration::from_micros(200));
}
