//! The agent by a configuration file, as kube-proxy is given one: what it says is in force; what changes in it is taken in, or ends the agent
//! with the datapath serving on; what breaks in it changes nothing. And the agent under kube-proxy's name.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::socket::Transport,
    suite::Suite,
    world::{AgentOptions, Ask, Family, Programs, SocketLb, Spec, Topology, World, objects, patience, vip, within},
};

/// As kubeadm's ConfigMap has it, with what the cases change.
const THEIRS: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                      clientConnection: {kubeconfig: /nonexistent/kubeconfig.conf, qps: 50}\nmode: \"\"\niptables: null\n";
const OWN: &str = "---\napiVersion: proxy-agent/v1alpha1\nkind: ProxyAgentConfiguration\n";

fn main() -> ExitCode {
    Suite::in_worlds(
        "configuration",
        ["ebpf", "nftables"].map(|mode| (format!("configuration/{mode}"), mode)),
        |programs, _| prepare(programs),
        |suite, group, mode, world| {
            let file = File::new(world);
            suite.case(&format!("{group}/what the file says is in force"), || in_force(world, &file, mode));
            suite.case(&format!("{group}/a file that breaks changes nothing"), || breaks(world, &file));
            suite.case(&format!("{group}/what is logged changes at once"), || live(world, &file, mode));
            suite.case(&format!("{group}/A141: another change ends the agent and names it"), || {
                ends(world, &file, mode)
            });
            suite.case(&format!("{group}/under kube-proxy's name"), || as_kube_proxy(world, &file, mode));
            suite.case(&format!("{group}/what nothing could start with is said once and tried again"), || {
                tries_again(world, &file, mode)
            });
            if *mode == "ebpf" {
                suite.case(&format!("{group}/--init-only says what ends with its container"), || {
                    mounts_for_itself(world)
                });
            }
        },
    )
}

fn prepare(programs: Programs) -> Result<World> {
    let world = World::new(&Spec::two_nodes(Topology::Routed), programs)?;
    let service =
        objects::service("web").cluster_ips(&Family::BOTH.map(|family| vip(family, 1))).port("web", "TCP", 80).json();
    let slices = Family::BOTH.map(|family| {
        objects::slice("web", family).port("web", "TCP", 8080).endpoints(["b1", "b2"].map(|pod| world.pod(pod))).json()
    });
    for object in [objects::nodes(&world), vec![service], slices.to_vec()].concat() {
        world.write(&object)?;
    }
    Ok(world)
}

/// A mounted ConfigMap: what is seen is a link into a directory that is swapped as a whole.
struct File {
    root: PathBuf,
}

impl File {
    fn new(world: &World) -> Self {
        Self { root: world.objects_dir().join("../configuration") }
    }

    fn path(&self) -> PathBuf {
        self.root.join("config.conf")
    }

    fn write(&self, text: &str) -> Result<()> {
        let states = fs::read_dir(&self.root).into_iter().flatten().count();
        let state = self.root.join(format!("..state-{states}"));
        fs::create_dir_all(&state)?;
        fs::write(state.join("config.conf"), text)?;
        let next = self.root.join("..data_tmp");
        symlink(&state, &next)?;
        fs::rename(next, self.root.join("..data"))?;
        if !self.path().is_symlink() {
            symlink("..data/config.conf", self.path())?;
        }
        Ok(())
    }
}

fn answers(world: &World) -> Result<()> {
    for from in [world.pod("a1"), &world.node(1).place] {
        for family in Family::BOTH {
            let to = (vip(family, 1), 80).into();
            let report = world.ask(from, &Ask::new(to, Transport::Tcp).times(3).timeout(2000))?;
            ensure!(report.errors().is_empty(), "{} to {to}: {:?}", from.name, report.errors());
        }
    }
    Ok(())
}

/// What is in the log by now, or soon.
fn logged(world: &World, words: &[&str]) -> Result<()> {
    within(patience(30), || {
        let log = world.node(1).agent_log();
        let has = |line: &str| words.iter().all(|word| line.contains(word));
        ensure!(log.lines().any(has), "nothing of {words:?} is in the log:\n{log}");
        Ok(())
    })
}

fn setting(world: &World, name: &str) -> Result<String> {
    let text = world.node(1).place.namespace.output("cat", &[&format!("/proc/sys/net/netfilter/{name}")])?;
    Ok(text.trim().to_owned())
}

fn in_force(world: &mut World, file: &File, mode: &str) -> Result<()> {
    let before = setting(world, "nf_conntrack_udp_timeout")?;
    file.write(&format!("{THEIRS}conntrack: {{udpTimeout: 77s}}\n{OWN}proxyMode: {mode}\n"))?;
    let mut options = AgentOptions::new(SocketLb::Node);
    // As kubeadm's DaemonSet has it, and an option that a file makes void.
    options.extra.extend([format!("--config={}", file.path().display()), "--proxy-mode=ipvs".to_owned()]);
    world.start_agent(1, &options)?;
    world.node(1).wait_ready(patience(30))?;
    let told = world.node(1).http(10249, "/proxyMode")?;
    ensure!(told == (200, mode.to_owned()), "/proxyMode: {told:?}");
    logged(world, &["WARN", "clientConnection.qps 50", "config.conf:3", "no effect"])?;
    logged(world, &["WARN", "--proxy-mode: not read beside --config"])?;
    // Of the kernel's conntrack where netfilter translates, else of the agent's own table.
    let udp = setting(world, "nf_conntrack_udp_timeout")?;
    ensure!(udp == if mode == "nftables" { "77" } else { before.as_str() }, "{udp}, before {before}");
    answers(world)
}

/// What runs must be the one that did.
fn still_runs(world: &World) -> Result<()> {
    ensure!(world.node(1).agent_running(), "it ended:\n{}", world.node(1).agent_log());
    answers(world)
}

fn breaks(world: &World, file: &File) -> Result<()> {
    file.write(&format!("{THEIRS}masqueradeAll: true\n"))?;
    logged(world, &["WARN", "config.conf:6", "masqueradeAll", "from before stays in force"])?;
    file.write(&format!("{THEIRS}{OWN}log: {{level: proxy_agent=loud}}\nalgorithm: maglev\n"))?;
    logged(world, &["WARN", "config.conf:9: log.level", "proxy_agent=loud", "from before stays in force"])?;
    file.write(&format!("{THEIRS}bindAddress: [\n"))?;
    logged(world, &["WARN", "config.conf", "from before stays in force"])?;
    fs::remove_file(file.path())?;
    logged(world, &["WARN", "cannot read", "config.conf"])?;
    still_runs(world)
}

fn live(world: &World, file: &File, mode: &str) -> Result<()> {
    file.write(&format!(
        "{THEIRS}conntrack: {{udpTimeout: 77s}}\nlogging: {{verbosity: 4}}\n{OWN}proxyMode: {mode}\n"
    ))?;
    logged(world, &["INFO", "changed: what is logged", "debug"])?;
    within(patience(30), || {
        let (code, shown) = world.node(1).http(10249, "/configz")?;
        ensure!(code == 200 && shown.contains("\"verbosity\":4"), "/configz: {code} {shown}");
        Ok(())
    })?;
    // What means nothing here is no reason to end, and is said.
    let theirs = THEIRS.replace("qps: 50", "qps: 60");
    file.write(&format!(
        "{theirs}conntrack: {{udpTimeout: 77s}}\nlogging: {{verbosity: 4}}\n{OWN}proxyMode: {mode}\n"
    ))?;
    logged(world, &["WARN", "clientConnection.qps 60", "no effect"])?;
    // Nor what means nothing in the mode that runs.
    let (theirs, own, field) = match mode {
        "ebpf" => (format!("{theirs}ipvs: {{scheduler: lc}}\n"), String::new(), "ipvs.scheduler lc"),
        _ => (theirs, "xdp: generic\n".to_owned(), "xdp generic"),
    };
    file.write(&format!(
        "{theirs}conntrack: {{udpTimeout: 77s}}\nlogging: {{verbosity: 4}}\n{OWN}proxyMode: {mode}\n{own}"
    ))?;
    logged(world, &["WARN", field, "no effect"])?;
    still_runs(world)
}

fn ends(world: &World, file: &File, mode: &str) -> Result<()> {
    file.write(&format!("{THEIRS}conntrack: {{udpTimeout: 77s}}\n{OWN}proxyMode: {mode}\nalgorithm: round-robin\n"))?;
    within(patience(30), || {
        let ended = world.node(1).agent_ended().context("it still runs")?;
        ensure!(ended.contains("config.conf changed (") && ended.contains("algorithm"), "{ended}");
        Ok(())
    })?;
    answers(world)
}

/// Ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn as_kube_proxy(world: &mut World, file: &File, mode: &str) -> Result<()> {
    world.remove_agents()?;
    file.write(&format!("{THEIRS}{OWN}proxyMode: {mode}\n"))?;
    let link = file.root.join("kube-proxy");
    symlink(&world.programs().agent, &link)?;
    let node = world.node(1);
    let command = |more: &[&str]| -> Result<Command> {
        let mut command = node.place.command(&link)?;
        command.arg(format!("--config={}", file.path().display())).args(more);
        command.args(["--hostname_override", "node1", "--source"]).arg(world.objects_dir());
        command.arg("--bpffs").arg(&node.bpffs).arg("--cgroup-root").arg(&node.cgroup);
        command.env_remove("KUBECONFIG").stdin(Stdio::null());
        Ok(command)
    };
    let done = command(&["--init-only"])?.output()?;
    ensure!(done.status.success(), "--init-only: {}", String::from_utf8_lossy(&done.stderr));
    ensure!(!world.node(1).place.namespace.output("nft", &["list", "tables"])?.contains("proxy-agent"), "it did more");
    let log = fs::File::create(file.root.join("log"))?;
    let running = Running(command(&[])?.stderr(log).stdout(Stdio::null()).spawn()?);
    within(patience(30), || {
        let (code, body) = node.http(10256, "/healthz")?;
        ensure!(code == 200, "/healthz: {code} {body}\n{}", said(&file.root.join("log")));
        Ok(())
    })?;
    let told = node.http(10249, "/proxyMode")?;
    ensure!(told == (200, mode.to_owned()), "/proxyMode: {told:?}");
    // As an init container beside a Pod that still runs.
    let done = command(&["--init-only"])?.output()?;
    ensure!(done.status.success(), "--init-only beside an agent: {}", String::from_utf8_lossy(&done.stderr));
    // A second agent is refused, and has set nothing.
    let before = setting(world, "nf_conntrack_udp_timeout")?;
    let second = file.root.join("second.conf");
    fs::write(&second, format!("{THEIRS}conntrack: {{udpTimeout: 55s}}\n{OWN}proxyMode: {mode}\n"))?;
    let refused = command(&[&format!("--config={}", second.display())])?.output()?;
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(3) && why.contains("another proxy-agent"), "{why}");
    let after = setting(world, "nf_conntrack_udp_timeout")?;
    ensure!(after == before, "nf_conntrack_udp_timeout: {before}, then {after}");
    answers(world)?;
    drop(running);
    answers(world)?;
    within(Duration::from_secs(20), || {
        let done = command(&["--cleanup"])?.output()?;
        ensure!(done.status.success(), "--cleanup: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    })?;
    ensure!(answers(world).is_err(), "it still serves");
    Ok(())
}

/// What the file names is not there yet.
fn tries_again(world: &World, file: &File, mode: &str) -> Result<()> {
    let node = world.node(1);
    let source = |path: &Path| format!("{THEIRS}{OWN}proxyMode: {mode}\nsource: {}\n", path.display());
    let (path, later) = (file.root.join("again.log"), file.root.join("later"));
    file.write(&source(&world.objects_dir()))?;
    let log = fs::File::create(&path)?;
    let mut command = node.place.command(&world.programs().agent)?;
    command.arg("run").arg(format!("--config={}", file.path().display())).args(["--hostname-override", "node1"]);
    command.arg("--bpffs").arg(&node.bpffs).arg("--cgroup-root").arg(&node.cgroup);
    command.env_remove("KUBECONFIG").env("NO_COLOR", "1").stdin(Stdio::null()).stdout(Stdio::null());
    let mut running = Running(command.stderr(log).spawn()?);
    within(patience(30), || {
        let (code, body) = node.http(10256, "/healthz")?;
        ensure!(code == 200, "/healthz: {code} {body}\n{}", said(&path));
        Ok(())
    })?;
    let times = || said(&path).matches("and this one is tried again").count();
    file.write(&source(&later))?;
    within(patience(30), || {
        ensure!(times() == 1, "{}", said(&path));
        Ok(())
    })?;
    // It is tried after half a second, then after a second more.
    std::thread::sleep(Duration::from_secs(2));
    ensure!(times() == 1 && running.0.try_wait()?.is_none(), "{}", said(&path));
    fs::create_dir(&later)?;
    within(patience(60), || {
        ensure!(said(&path).contains("(source): ending"), "{}", said(&path));
        Ok(())
    })?;
    let ended = running.0.wait()?;
    ensure!(ended.code() == Some(3), "{ended}: {}", said(&path));
    world.cli(node, &["cleanup"]).map(drop)
}

/// As an init container that was given nothing of the node's: what it mounts is its own, and no other container sees it.
fn mounts_for_itself(world: &World) -> Result<()> {
    const WITHOUT: &str = "while umount -l /sys/fs/bpf 2>/dev/null; do :; done; \"$@\" && stat -f -c %T /sys/fs/bpf";
    let agent = &world.programs().agent;
    for verb in [&["init"][..], &["run", "--init-only", "--proxy-mode=ebpf", "--source=/"]] {
        let mut command = world.node(1).place.command("unshare")?;
        command.args([
            "--mount",
            "--propagation=private",
            "--pid",
            "--fork",
            "--mount-proc",
            "sh",
            "-c",
            WITHOUT,
            "sh",
        ]);
        let done = command.arg(agent).args(verb).env_remove("KUBECONFIG").stdin(Stdio::null()).output()?;
        let [out, err] = [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        let is_said = err.contains("ends with this container");
        ensure!(done.status.success() && out.ends_with("bpf_fs\n") && is_said, "{verb:?}: {out} {err}");
    }
    Ok(())
}

fn said(log: &Path) -> String {
    fs::read_to_string(log).unwrap_or_default()
}
