//! A node: a network, mount, UTS and cgroup namespace, and in them containerd and a kubelet.
//!
//! Inside, the machine's root file system is the node's, but for `/run`, `/var/lib`, `/var/log`, cgroups and bpffs: these are its
//! own, as are copies of the settings that a kubelet changes ([`machine`]). So a hostPath of a manifest is the node's, and what a
//! DaemonSet attaches to the root of its cgroups meets its pods alone.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{images, layout, machine, network};
use crate::{
    apiserver::{spawn, tail},
    world::{Namespace, cgroup},
};

/// Where Debian has the plugins of the container network interface.
pub(super) const PLUGINS: &str = "/usr/lib/cni";

/// Inside the new namespaces; `$1`: the node's name, `$2`: its disk; what follows are hierarchies, as `options directory`, v2 as `-`.
const PREPARE: &str = r#"
hostname "$1"
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock
mount --bind "$2/lib" /var/lib
mount --bind "$2/log" /var/log
for setting in "$2"/settings/*; do
    mount --bind "$setting" "/proc/sys/$(basename "$setting" | tr . /)"
done
# Who looks for a hierarchy is to find one mount of it.
umount -R /sys/fs/cgroup
mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
shift 2
while [ $# -gt 0 ]; do
    mkdir -p "/sys/fs/cgroup/$2"
    if [ "$1" = - ]; then
        mount -t cgroup2 cgroup2 "/sys/fs/cgroup/$2"
    else
        mount -t cgroup -o "$1" cgroup "/sys/fs/cgroup/$2"
    fi
    shift 2
done
mount -t bpf bpf /sys/fs/bpf
# Volumes of pods that follow the node's mounts want these shared.
mount --make-rshared /
echo ready
exec sleep infinity
"#;

pub(super) struct Node {
    pub(super) name: String,
    number: u8,
    /// Its cgroup in every hierarchy.
    cgroups: Vec<PathBuf>,
    disk: PathBuf,
    /// Holds the namespaces.
    holder: Child,
    daemons: Vec<Child>,
}

impl Node {
    pub(super) fn name_of(number: u8) -> String {
        format!("node{number}")
    }

    /// The credentials of its kubelet: a line for the API server's file of tokens.
    pub(super) fn token_line(number: u8) -> String {
        let name = Self::name_of(number);
        format!("{},system:node:{name},{name},system:nodes\n", Self::token(number))
    }

    pub(super) fn token(number: u8) -> String {
        format!("{}-token", Self::name_of(number))
    }

    /// The namespaces, with nothing running in them.
    pub(super) fn create(number: u8, namespace: &Namespace) -> Result<Self> {
        let name = Self::name_of(number);
        let disk = layout::node(&name);
        for dir in ["lib/containerd", "lib/kubelet", "log", "cni"] {
            let dir = disk.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        }
        fs::write(disk.join("resolv.conf"), format!("nameserver {}\n", network::SERVERS))?;
        machine::copy_settings(&disk.join("settings"))?;
        let cgroups = layout::cgroups(&name)?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", namespace.path()))
            .args(["unshare", "--mount", "--uts", "--cgroup", "--propagation", "private"])
            .args(["sh", "-e", "-c", PREPARE, "sh", &name])
            .arg(&disk)
            .args(hierarchies()?);
        enter_cgroups(&mut command, &cgroups)?;
        let log = layout::logs().join(format!("{name}.log"));
        let mut holder = spawn(command, &log)?;
        let began = Instant::now();
        while !fs::read_to_string(&log).is_ok_and(|text| text.ends_with("ready\n")) {
            if holder.try_wait()?.is_some() || began.elapsed() > Duration::from_secs(20) {
                bail!("the namespaces of {name} cannot be made: {}", tail(&log));
            }
            sleep(Duration::from_millis(20));
        }
        Ok(Self { name, number, cgroups, disk, holder, daemons: Vec::new() })
    }

    /// A command inside, in the node's cgroups.
    pub(super) fn command(&self, program: impl AsRef<Path>) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={}", self.holder.id()))
            .args(["--net", "--mount", "--uts", "--cgroup"])
            .arg(program.as_ref());
        enter_cgroups(&mut command, &self.cgroups)?;
        Ok(command)
    }

    /// How to run a command inside by hand.
    pub(super) fn by_hand(&self) -> String {
        format!("nsenter --target={} --net --mount --uts --cgroup", self.holder.id())
    }

    pub(super) fn start_containerd(&mut self) -> Result<()> {
        let config = self.disk.join("containerd.toml");
        fs::write(&config, self.containerd_config())?;
        fs::write(self.disk.join("cni/10-pods.conflist"), serde_json::to_vec_pretty(&self.plugin_config())?)?;
        let mut command = self.command("containerd")?;
        command.arg("--config").arg(&config);
        self.daemons.push(spawn(command, &self.log("containerd"))?);
        Ok(())
    }

    fn log(&self, what: &str) -> PathBuf {
        layout::logs().join(format!("{}-{what}.log", self.name))
    }

    fn containerd_config(&self) -> String {
        let Self { disk, .. } = self;
        format!(
            r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # Without CAP_SYS_RESOURCE a score cannot be lowered, and runc's error blames something else.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{PLUGINS}"
    conf_dir = "{}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"#,
            disk.display(),
            pause = images::PAUSE
        )
    }

    fn plugin_config(&self) -> serde_json::Value {
        json!({
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "ptp",
                    "ipMasq": false,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": "/run/cni-ipam",
                        "ranges": [[{"subnet": network::pod_range(self.number)}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": true}},
            ],
        })
    }

    /// containerd's client.
    fn ctr(&self, args: &[&str]) -> Result<Command> {
        let mut command = self.command("ctr")?;
        command.args(["--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io"]).args(args);
        Ok(command)
    }

    pub(super) fn wait_containerd(&mut self) -> Result<()> {
        let began = Instant::now();
        while !self.ctr(&["images", "list", "--quiet"])?.output()?.status.success() {
            for daemon in &mut self.daemons {
                if let Some(status) = daemon.try_wait()? {
                    bail!("containerd of {} ended ({status}): {}", self.name, tail(&self.log("containerd")));
                }
            }
            if began.elapsed() > Duration::from_secs(60) {
                bail!("containerd of {} does not answer: {}", self.name, tail(&self.log("containerd")));
            }
            sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Images go in by hand: there is no registry.
    pub(super) fn import(&self, image: &Path) -> Result<()> {
        let mut command = self.ctr(&["images", "import"])?;
        let done = command.arg(image).stdin(Stdio::null()).output().context("run ctr")?;
        if !done.status.success() {
            let why = String::from_utf8_lossy(&done.stderr);
            bail!("{} takes no image {}: {}", self.name, image.display(), why.trim());
        }
        Ok(())
    }

    pub(super) fn start_kubelet(&mut self, kubelet: &Path, kubeconfig: &Path) -> Result<()> {
        let config = self.disk.join("kubelet.json");
        fs::write(&config, serde_json::to_vec_pretty(&self.kubelet_config())?)?;
        let mut command = self.command(kubelet)?;
        command
            .arg("--config")
            .arg(&config)
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .arg(format!("--hostname-override={}", self.name))
            .arg(format!("--node-ip={}", network::node_address(self.number)));
        self.daemons.push(spawn(command, &self.log("kubelet"))?);
        Ok(())
    }

    fn kubelet_config(&self) -> serde_json::Value {
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            // Nobody reaches it but this cluster.
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "failCgroupV1": false,
            "cgroupDriver": "cgroupfs",
            // Of its cgroup namespace.
            "cgroupRoot": "/",
            "clusterDNS": [network::SERVERS],
            "clusterDomain": "cluster.local",
            "resolvConf": self.disk.join("resolv.conf"),
            // Not the machine's.
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "failSwapOn": false,
            // The machine's disk and memory are not this cluster's alone.
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "oomScoreAdj": 0,
            "readOnlyPort": 0,
            // As soon as it has changed, not by the minute.
            "syncFrequency": "10s",
            "nodeStatusUpdateFrequency": "5s",
        })
    }

    /// What no controller of this cluster gives it: its range of pods, and one of three zones.
    pub(super) fn patch(&self) -> String {
        let range = network::pod_range(self.number);
        let zone = format!("zone{}", (self.number - 1) % 3 + 1);
        json!({
            "metadata": {"labels": {"topology.kubernetes.io/zone": zone}},
            "spec": {"podCIDR": range, "podCIDRs": [range]},
        })
        .to_string()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for mut child in self.daemons.drain(..) {
            // What is gone already needs no ending. Pods go with the cgroups.
            let _gone = child.kill();
            let _gone = child.wait();
        }
        let _gone = self.holder.kill();
        let _gone = self.holder.wait();
    }
}

/// For [`PREPARE`].
fn hierarchies() -> Result<Vec<String>> {
    let mut args = Vec::new();
    for cgroup::Hierarchy { at, v1 } in cgroup::hierarchies()? {
        let below = at.strip_prefix("/sys/fs/cgroup").with_context(|| format!("cgroups at {}", at.display()))?;
        let options = match v1 {
            None => "-".to_owned(),
            // A hierarchy without a controller is told by its name.
            Some(options) if options.starts_with("name=") => format!("none,{options}"),
            Some(options) => options,
        };
        args.extend([options, below.display().to_string()]);
    }
    Ok(args)
}

/// Before anything of it runs: what it starts, and its cgroup namespace, are there, too.
fn enter_cgroups(command: &mut Command, cgroups: &[PathBuf]) -> Result<()> {
    let mut files: Vec<File> = Vec::new();
    for dir in cgroups {
        let procs = dir.join("cgroup.procs");
        let file = OpenOptions::new().write(true).open(&procs).with_context(|| format!("open {}", procs.display()))?;
        files.push(file);
    }
    // SAFETY: between fork and exec the closure writes to files that it owns, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            for mut file in &files {
                file.write_all(b"0")?;
            }
            Ok(())
        });
    }
    Ok(())
}
