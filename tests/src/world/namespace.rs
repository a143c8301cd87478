//! A network namespace with a name, and ways to do things in it.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

#[derive(Clone)]
pub struct Namespace {
    name: String,
    file: Arc<File>,
}

impl Namespace {
    /// Makes it, with its loopback up. The world's layout removes it.
    pub fn create(name: &str) -> Result<Self> {
        let made = Command::new("ip").args(["netns", "add", name]).output().context("run ip(8)")?;
        if !made.status.success() {
            bail!("ip netns add {name}: {}", String::from_utf8_lossy(&made.stderr).trim());
        }
        let path = PathBuf::from("/run/netns").join(name);
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let namespace = Self { name: name.to_owned(), file: Arc::new(file) };
        // No duplicate-address detection and no router advertisements: addresses are there at once and stay as they are.
        namespace.sysctl(&[
            ("ipv6/conf/default/accept_dad", "0"),
            ("ipv6/conf/default/dad_transmits", "0"),
            ("ipv6/conf/default/accept_ra", "0"),
            ("ipv6/conf/all/accept_ra", "0"),
        ])?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where `nsenter --net=` finds it.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// A command that runs in this namespace; the file system stays as it is.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let file = Arc::clone(&self.file);
        // SAFETY: between fork and exec the closure makes one system call on a descriptor that it owns.
        unsafe { command.pre_exec(move || setns(file.as_ref(), CloneFlags::CLONE_NEWNET).map_err(Into::into)) };
        command
    }

    /// Lines for `ip -batch`.
    pub fn ip(&self, script: &str) -> Result<()> {
        self.batch("ip", script)
    }

    /// Lines for `bridge -batch`.
    pub fn bridge(&self, script: &str) -> Result<()> {
        self.batch("bridge", script)
    }

    fn batch(&self, program: &str, script: &str) -> Result<()> {
        let mut child = self
            .command(program)
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {program}(8)"))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(script.as_bytes())?;
        }
        let done = child.wait_with_output()?;
        if !done.status.success() {
            bail!("{program} in {}: {}\n{script}", self.name, String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(())
    }

    /// Runs a tool and returns what it printed.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        let done = self.command(program).args(args).output().with_context(|| format!("run {program}"))?;
        if !done.status.success() {
            bail!("{program} {} in {}: {}", args.join(" "), self.name, String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// Loads an nftables script.
    pub fn nft(&self, script: &str) -> Result<()> {
        self.output("nft", &[script]).map(drop)
    }

    /// Takes all rules of netfilter, of whatever tool.
    pub fn flush_rules(&self) -> Result<()> {
        self.nft("flush ruleset")?;
        for (tool, table) in self.legacy_tables()? {
            // A chain goes once no rule names it.
            for what in ["-F", "-X"] {
                self.output(tool, &["-w", "-t", &table, what])?;
            }
        }
        Ok(())
    }

    /// All rules of netfilter, of whatever tool; tables and chains without any are none.
    pub fn rules(&self) -> Result<Vec<String>> {
        let listed: Value = serde_json::from_str(&self.output("nft", &["-j", "list", "ruleset"])?)?;
        let of_nft = listed["nftables"].as_array().into_iter().flatten().filter(|one| one.get("rule").is_some());
        let mut rules: Vec<String> = of_nft.map(Value::to_string).collect();
        for (tool, table) in self.legacy_tables()? {
            let listed = self.output(tool, &["-w", "-t", &table, "-S"])?;
            rules.extend(listed.lines().filter(|line| line.starts_with("-A")).map(|line| format!("{table} {line}")));
        }
        Ok(rules)
    }

    /// Filters of clsact on every device. They stay when whoever made them is gone, and so do their programs and maps.
    pub fn filters(&self) -> Result<Vec<String>> {
        let links: Value = serde_json::from_str(&self.output("ip", &["-j", "link", "show"])?)?;
        let mut filters = Vec::new();
        for link in links.as_array().into_iter().flatten().filter_map(|link| link["ifname"].as_str()) {
            for way in ["ingress", "egress"] {
                let shown = self.output("tc", &["filter", "show", "dev", link, way])?;
                filters.extend(shown.lines().map(|line| format!("{link} {way}: {line}")));
            }
        }
        Ok(filters)
    }

    /// Those that are in use here, each with the tool to change it. nft sees nothing of them.
    fn legacy_tables(&self) -> Result<Vec<(&'static str, String)>> {
        self.enter(|| {
            let mut tables = Vec::new();
            for (tool, names) in [("iptables-legacy", "ip_tables_names"), ("ip6tables-legacy", "ip6_tables_names")] {
                let path = format!("/proc/thread-self/net/{names}");
                // Without the file the kernel has no such tables.
                match fs::read_to_string(&path) {
                    Ok(text) => tables.extend(text.lines().map(|table| (tool, table.to_owned()))),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error).with_context(|| format!("read {path}")),
                }
            }
            Ok(tables)
        })?
    }

    /// Runs a closure on a thread that has entered the namespace. Not in the place's cgroup: what it connects is not
    /// translated.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<T> {
                setns(self.file.as_ref(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("enter the namespace {}", self.name))?;
                Ok(inside())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes below /proc/sys/net.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (key, value) in settings {
                let path = format!("/proc/sys/net/{key}");
                fs::write(&path, value).with_context(|| format!("write {value} to {path}"))?;
            }
            Ok(())
        })?
    }
}
