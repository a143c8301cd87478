//! The images, started in a container as the rendered manifests say: their capabilities and no other, a read-only root, their mounts,
//! and the seccomp filter of container runtimes, on a node of a world.
//!
//! `cargo xtask test` makes the images, of the same agent that the other suites run, and names their directory: `PROXY_IMAGES`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use proxy_tests::{
    manifests::{BASE, Container, Pod, Security},
    pod::socket::Transport,
    podman::Podman,
    suite::Suite,
    world::{Ask, Family, Node, Programs, Spec, Topology, World, cleanup_on_signals, objects, patience, vip, within},
};
use serde_json::{Value, json};

/// What container runtimes allow by default, as the package of podman has it.
const FILTER: &str = "/usr/share/containers/seccomp.json";
/// crun takes no hierarchy of both versions: it sees the one of version 2 alone.
const CGROUPS: &str = "mount -t cgroup2 none /sys/fs/cgroup";
/// Where it is started, in the cgroup and the network namespace of that place. podman by itself gives it higher limits than a machine without
/// SYS_RESOURCE may.
const RUN: [&str; 6] = [
    "run",
    "--pull=never",
    "--network=host",
    "--cgroups=disabled",
    "--ulimit=nofile=4096:4096",
    "--ulimit=nproc=16384:16384",
];
/// Of nobody: a kubeconfig without a certificate asks for those of public authorities, and the image has none.
const AUTHORITY: &str = "-----BEGIN CERTIFICATE-----\n\
    MIIBgjCCASegAwIBAgIUDaSWGlusSHnqGetAXq0Es9l3d40wCgYIKoZIzj0EAwIwFTETMBEGA1UEAwwKbmFtZXMudGVzdDAgFw0yNjExMjIwNj\n\
    M3NDFaGA8yMTI2MTAyOTA2Mzc0MVowFTETMBEGA1UEAwwKbmFtZXMudGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABMehKXH4lrABepiP\n\
    snuIzsvFoW50+dl9qLmBReOZzhgvPKfip67xrAv6OXLuBihH225QNvBl/o9K6gp36ll+4MyjUzBRMB0GA1UdDgQWBBTZ6exA1E3QNcksDyTnNB\n\
    dPpjeffjAfBgNVHSMEGDAWgBTZ6exA1E3QNcksDyTnNBdPpjeffjAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0kAMEYCIQDcQbAOri2j\n\
    eoBTrGMp6zlJKfSEKNysq+JxhBznn5dtHgIhAMuR327eUZDZe5Oz7t2kw7oj3JJg6QQjlSHSTQqr6gjs\n\
    -----END CERTIFICATE-----\n";
const BACKENDS: [&str; 2] = ["b1", "c1"];

type Case = fn(&mut Ground) -> Result<()>;

fn main() -> ExitCode {
    let mut suite = Suite::new("image");
    let cases: [(&str, Case); 6] = [
        ("image/with the capabilities of the base it serves", serves),
        ("image/with one capability less it names that", one_less),
        ("image/names of API servers: by /etc/hosts and by DNS", names),
        ("image/with tools: by nftables", nftables),
        ("image/with tools: by iptables of both kinds", iptables),
        ("image/the step that mounts bpffs", mounts_bpffs),
    ];
    if !cases.iter().any(|(name, _)| suite.wants(name)) {
        return suite.finish();
    }
    let Some(programs) = suite.programs() else { return suite.finish() };
    match cleanup_on_signals().and_then(|()| World::sweep()).and_then(|_| Ground::new(programs)) {
        Ok(mut ground) => {
            for (name, case) in cases {
                suite.case(name, || case(&mut ground));
            }
        }
        Err(error) => suite.fail("preparation", &error),
    }
    suite.finish()
}

/// A node with pods and a Service, and the images. Fields are dropped in this order: nothing may run on the node when that goes.
struct Ground {
    engine: Engine,
    world: World,
}

impl Ground {
    fn new(programs: Programs) -> Result<Self> {
        let pods = ["a1", "b1", "c1"].map(str::to_owned).to_vec();
        let world = World::new(&Spec { nodes: vec![pods], ..Spec::two_nodes(Topology::Routed) }, programs)?;
        let service = objects::service("web")
            .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
            .port("web", "TCP", 80)
            .port("dns", "UDP", 53);
        let slice = |family| {
            let slice = objects::slice("web", family).port("web", "TCP", 8080).port("dns", "UDP", 8080);
            slice.endpoints(BACKENDS.map(|pod| world.pod(pod))).json()
        };
        let all = [objects::nodes(&world), vec![service.json()], Family::BOTH.map(slice).to_vec()].concat();
        all.iter().try_for_each(|object| world.write(object))?;
        Ok(Self { engine: Engine::new()?, world })
    }

    fn node(&self) -> &Node {
        self.world.node(1)
    }

    /// Where the node has what the manifests mount.
    fn source(&self, path: &str) -> Result<PathBuf> {
        Ok(match path {
            "/sys/fs/bpf" => self.node().bpffs.clone(),
            "/sys/fs/cgroup" => {
                let cgroup = &self.node().cgroup;
                Path::new("/sys/fs/cgroup").join(cgroup.strip_prefix("/sys/fs/cgroup/unified").unwrap_or(cgroup))
            }
            "/run/xtables.lock" => {
                let lock = self.engine.directory.join("xtables.lock");
                File::options().create(true).append(true).open(&lock)?;
                lock
            }
            other => bail!("what is {other} in a world?"),
        })
    }

    /// The agent of a directory's DaemonSet, reading the world's objects instead of a cluster's.
    fn agent(&self, directory: &str) -> Result<Container> {
        let mut container = Pod::of(directory)?.agent("node1")?;
        // A world's node has a part of the machine's cgroups; the root of all would be the whole machine.
        container.args.push("--cgroup-root=/host/cgroup".to_owned());
        Ok(container)
    }

    fn start(&self, container: &Container, more: &[String]) -> Result<Running<'_>> {
        let mut container = container.clone();
        container.args.extend(more.iter().cloned());
        self.start_with(&container, &[format!("--volume={}:/objects:ro", self.world.objects_dir().display())])
    }

    fn start_with(&self, container: &Container, options: &[String]) -> Result<Running<'_>> {
        let mut options = options.to_vec();
        for mount in &container.mounts {
            let source = self.source(&mount.source)?;
            let access = if mount.read_only { "ro" } else { "rw" };
            options.push(format!("--volume={}:{}:{access}", source.display(), mount.at));
        }
        options.extend(container.env.iter().map(|(name, value)| format!("--env={name}={value}")));
        self.engine.run(self.node().place.command("unshare")?, container, &options)
    }

    /// Ready, and answering for the Service: from a pod and from the node, by both families.
    fn serves(&self, container: &Container, more: &[&str]) -> Result<Running<'_>> {
        let more: Vec<String> = ["--source=/objects"].iter().chain(more).map(|&word| word.to_owned()).collect();
        let mut running = self.start(container, &more)?;
        let began = Instant::now();
        while !self.node().http(10256, "/healthz").is_ok_and(|(code, _)| code == 200) {
            let ended = running.child.try_wait()?;
            ensure!(ended.is_none() && began.elapsed() < patience(60), "not ready ({ended:?}): {}", running.words()?);
            std::thread::sleep(Duration::from_millis(50));
        }
        for from in [self.world.pod("a1"), &self.node().place] {
            for family in Family::BOTH {
                for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp)] {
                    let to = SocketAddr::new(vip(family, 1), port);
                    let report = self.world.ask(from, &Ask::new(to, transport).times(30))?;
                    let seen = report.backends();
                    ensure!(
                        report.errors().is_empty() && seen.keys().eq(BACKENDS),
                        "{} -> {to} {transport}: {seen:?} {:?}\n{}",
                        from.name,
                        report.errors(),
                        running.words()?
                    );
                }
            }
        }
        Ok(running)
    }

    /// What an agent left goes with the next one's pins and rules.
    fn cleanup(&self, container: &Container) -> Result<()> {
        let mut cleanup = container.clone();
        let bpffs = container.args.iter().find(|arg| arg.starts_with("--bpffs=")).context("no --bpffs")?;
        cleanup.args = vec!["cleanup".to_owned(), bpffs.clone()];
        let (status, words) = self.start(&cleanup, &[])?.ends()?;
        ensure!(status.success(), "cleanup ended with {status}: {words}");
        Ok(())
    }
}

/// podman, and the images in it. Dropping it removes all that is left of both.
struct Engine {
    podman: Podman,
    directory: PathBuf,
    filter: PathBuf,
    number: AtomicU32,
}

impl Engine {
    fn new() -> Result<Self> {
        let images = std::env::var_os("PROXY_IMAGES").map(PathBuf::from);
        let images =
            images.context("PROXY_IMAGES names no directory: `cargo xtask test netns --filter image/` makes one")?;
        // Short: the names of sockets that podman makes below it have little room.
        let directory = std::env::temp_dir().join(format!("proxy-image-{}", std::process::id()));
        let podman = Podman::new(&directory)?;
        let filter = directory.join("seccomp.json");
        fs::write(&filter, filter_with_bpf(&fs::read_to_string(FILTER).with_context(|| format!("read {FILTER}"))?)?)?;
        let engine = Self { podman, directory, filter, number: AtomicU32::new(0) };
        for archive in ["proxy-agent.tar", "proxy-agent-tools.tar"] {
            let archive = images.join(archive);
            ensure!(
                archive.is_file(),
                "there is no {}: what xtask said before the suites has the reason",
                archive.display()
            );
            engine.said(&["load", "--quiet", "--input", &archive.to_string_lossy()])?;
        }
        Ok(engine)
    }

    /// podman, by way of unshare(1), which `command` starts: in a mount namespace of its own. `first`: what the shell in there does before.
    fn podman(&self, mut command: Command, first: &str) -> Command {
        let script = format!("{CGROUPS} && {first} exec \"$@\"");
        command.args(["--mount", "sh", "-c", &script, "sh", "podman"]).args(self.podman.arguments());
        command.envs(self.podman.variables()).stdin(Stdio::null());
        command
    }

    fn said(&self, args: &[&str]) -> Result<String> {
        let done = self.podman(Command::new("unshare"), "").args(args).output().context("start podman")?;
        ensure!(done.status.success(), "podman {}: {}", args.join(" "), String::from_utf8_lossy(&done.stderr).trim());
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    }

    /// What of the command line is the manifests'.
    fn security(&self, security: &Security) -> Vec<String> {
        let Security { capabilities, read_only, user, may_gain, filtered } = security;
        let mut options = vec![format!("--user={user}")];
        match capabilities {
            None => options.push("--privileged".to_owned()),
            Some(capabilities) => {
                options.push("--cap-drop=all".to_owned());
                options.extend(capabilities.iter().map(|capability| format!("--cap-add={capability}")));
            }
        }
        if *read_only {
            options.extend(["--read-only".to_owned(), "--read-only-tmpfs=false".to_owned()]);
        }
        if !may_gain {
            options.push("--security-opt=no-new-privileges".to_owned());
        }
        if *filtered {
            options.push(format!("--security-opt=seccomp={}", self.filter.display()));
        }
        options
    }

    /// `command`: unshare(1) where the container is to be. It stays in that place's cgroup and network namespace.
    fn run(&self, command: Command, container: &Container, options: &[String]) -> Result<Running<'_>> {
        let name = format!("agent-{}", self.number.fetch_add(1, Ordering::Relaxed));
        let log = self.directory.join(format!("{name}.log"));
        let output = File::create(&log)?;
        let child = self
            .podman(command, "")
            .args(RUN)
            .arg(format!("--name={name}"))
            .args(self.security(&container.security))
            .args(options)
            .arg(format!("docker.io/library/{}", container.image))
            .args(&container.args)
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("start podman")?;
        Ok(Running { engine: self, child, name, log })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let removed = self.said(&["rm", "--all", "--force", "--time=0"]).map(drop);
        if let Err(error) = removed.and_then(|()| Ok(fs::remove_dir_all(&self.directory)?)) {
            eprintln!("{} is not removed whole: {error:#}", self.directory.display());
        }
    }
}

/// A container; ended and removed when dropped.
struct Running<'a> {
    engine: &'a Engine,
    child: Child,
    name: String,
    log: PathBuf,
}

impl Running<'_> {
    fn words(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("read {}", self.log.display()))
    }

    /// How it ended, and what it said.
    fn ends(mut self) -> Result<(ExitStatus, String)> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok((status, self.words()?));
            }
            ensure!(began.elapsed() < patience(60), "it goes on: {}", self.words()?);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A line of its process's status, by the kernel.
    fn status(&self) -> Result<BTreeMap<String, String>> {
        let pid = self.engine.said(&["inspect", "--format={{.State.Pid}}", &self.name])?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let pairs = status.lines().filter_map(|line| line.split_once(':'));
        Ok(pairs.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect())
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.engine.said(&["rm", "--ignore", "--force", "--time=0", &self.name]) {
            eprintln!("{} is not removed: {error:#}", self.name);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The filter as containerd has had it since 1.7, and Docker since 23: who holds CAP_BPF may call bpf(2).
fn filter_with_bpf(filter: &str) -> Result<String> {
    let mut filter: Value = serde_json::from_str(filter).context("the seccomp filter")?;
    let rules = filter["syscalls"].as_array_mut().context("no rules")?;
    for rule in rules.iter_mut().filter(|rule| rule["action"] == "SCMP_ACT_ERRNO") {
        if let Some(names) = rule["names"].as_array_mut() {
            names.retain(|name| name != "bpf");
        }
    }
    rules.push(json!({"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "args": [], "includes": {"caps": ["CAP_BPF"]}, "excludes": {}}));
    Ok(filter.to_string())
}

/// As the kernel numbers them.
fn bit(capability: &str) -> Result<u64> {
    Ok(1 << match capability {
        "NET_ADMIN" => 12,
        "NET_RAW" => 13,
        "PERFMON" => 38,
        "BPF" => 39,
        other => bail!("no number is known for {other}"),
    })
}

fn serves(ground: &mut Ground) -> Result<()> {
    let container = ground.agent(BASE)?;
    let running = ground.serves(&container, &[])?;
    let capabilities = container.security.capabilities.as_ref().context("it is privileged")?;
    let wanted = capabilities.iter().map(|capability| bit(capability)).sum::<Result<u64>>()?;
    let status = running.status()?;
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let held = u64::from_str_radix(&status[set], 16)?;
        ensure!(held == wanted, "{set} is {held:#x}, the manifests' is {wanted:#x}");
    }
    ensure!(status["NoNewPrivs"] == "1" && status["Seccomp"] == "2", "{status:?}");
    // The readers find the pins in there.
    let shown = ground.engine.said(&["exec", &running.name, "proxy-agent", "services", "-o", "json"])?;
    ensure!(shown.contains(&vip(Family::V4, 1).to_string()), "services: {shown}");
    drop(running);
    ground.cleanup(&container)
}

fn one_less(ground: &mut Ground) -> Result<()> {
    let whole = ground.agent(BASE)?;
    let capabilities = whole.security.capabilities.clone().context("it is privileged")?;
    ensure!(!capabilities.is_empty(), "there is none to take away");
    for missing in &capabilities {
        let mut container = whole.clone();
        let rest = capabilities.iter().filter(|one| *one != missing).cloned().collect();
        container.security.capabilities = Some(rest);
        let (status, words) = ground.start(&container, &["--source=/objects".to_owned()])?.ends()?;
        ensure!(
            status.code() == Some(3) && words.contains(&format!("CAP_{missing}")),
            "without {missing} it ended with {status}: {words}"
        );
    }
    Ok(())
}

/// A static binary has its C library's own resolver, in an image without anything else of it.
fn names(ground: &mut Ground) -> Result<()> {
    let directory = ground.engine.directory.join("names");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("hosts"), "127.0.0.1 localhost\n127.0.0.1 hosts.test\n")?;
    fs::write(directory.join("resolv.conf"), "nameserver 127.0.0.1\noptions timeout:1 attempts:2\n")?;
    fs::write(directory.join("ca.crt"), AUTHORITY)?;
    let server = Names::start(ground.node())?;
    for (name, wanted) in [
        // Nobody listens there.
        ("hosts.test", "Connection refused"),
        ("dns.test", "Connection refused"),
        ("nowhere.test", "failed to lookup address information"),
    ] {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("https://{name}:1"), "certificate-authority": "ca.crt"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        fs::write(directory.join(name), config.to_string())?;
        let mut container = ground.agent(BASE)?;
        container.args.push(format!("--kubeconfig=/names/{name}"));
        let options: Vec<String> = [("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf"), ("", "/names")]
            .map(|(from, to)| format!("--volume={}:{to}:ro", directory.join(from).display()))
            .into();
        let running = ground.start_with(&container, &options)?;
        within(patience(30), || {
            let status = ground.node().status().with_context(|| running.words().unwrap_or_default())?.to_string();
            ensure!(status.contains(wanted), "{name}: {wanted:?} is not in {status}\n{}", running.words()?);
            Ok(())
        })?;
    }
    drop(server);
    ground.cleanup(&ground.agent(BASE)?)
}

/// A server of names on the node's loopback: `dns.test` is 127.0.0.1, and nothing else is anything.
struct Names {
    stop: Arc<AtomicBool>,
}

impl Names {
    fn start(node: &Node) -> Result<Self> {
        let socket = node.place.namespace.enter(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 53)))??;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            let mut question = [0; 512];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut question) else { continue };
                if let Some(answer) = question.get(..length).and_then(answer) {
                    let _unread = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self { stop })
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// RFC 1035: header, the question as it was asked, and an address if that is what was asked for.
fn answer(question: &[u8]) -> Option<Vec<u8>> {
    const NAME: &[u8] = b"\x03dns\x04test\0";
    let (header, rest) = question.split_at_checked(12)?;
    let end = rest.iter().position(|byte| *byte == 0)? + 1;
    let (name, kind) = (rest.get(..end)?, rest.get(end..end + 4)?);
    let (known, address) = (name == NAME, kind == [0, 1, 0, 1]);
    let found = known && address;
    let mut answer = header.get(..2)?.to_vec();
    // A response, recursion available; no such name, unless it is known.
    answer.extend([0x81, if known { 0x80 } else { 0x83 }, 0, 1, 0, u8::from(found), 0, 0, 0, 0]);
    answer.extend(rest.get(..end + 4)?);
    if found {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        answer.extend(Ipv4Addr::LOCALHOST.octets());
    }
    Some(answer)
}

fn nftables(ground: &mut Ground) -> Result<()> {
    let container = ground.agent("manifests/overlays/nftables")?;
    drop(ground.serves(&container, &[])?);
    ground.cleanup(&container)
}

fn iptables(ground: &mut Ground) -> Result<()> {
    let container = ground.agent("manifests/overlays/iptables")?;
    for flavour in ["nft", "legacy"] {
        let flavour = format!("--iptables-flavour={flavour}");
        drop(ground.serves(&container, &[&flavour]).with_context(|| flavour.clone())?);
        ground.cleanup(&container).with_context(|| flavour.clone())?;
    }
    // What the overlay adds, it needs.
    let mut less = container;
    if let Some(capabilities) = &mut less.security.capabilities {
        capabilities.retain(|capability| capability != "NET_RAW");
    }
    let more = ["--source=/objects", "--iptables-flavour=legacy"].map(str::to_owned);
    let (status, words) = ground.start(&less, &more)?.ends()?;
    ensure!(status.code() == Some(3) && words.contains("NET_RAW"), "without NET_RAW it ended with {status}: {words}");
    Ok(())
}

/// On a node that has none, in a mount namespace of its own.
fn mounts_bpffs(ground: &mut Ground) -> Result<()> {
    const NODE: &str = "while umount -l /sys/fs/bpf 2>/dev/null; do :; done; mount --make-rshared / && stat -f -c %T /sys/fs/bpf && \
                        \"$@\" && stat -f -c %T /sys/fs/bpf &&";
    let container = Pod::of("manifests/overlays/kind")?.mount_bpffs("node1")?;
    let mut options = Vec::new();
    for mount in &container.mounts {
        ensure!(mount.source == "/sys/fs/bpf" && mount.bidirectional, "{mount:?}");
        options.push(format!("--volume={}:{}:rw,rshared", mount.source, mount.at));
    }
    let done = ground
        .engine
        .podman(ground.node().place.command("unshare")?, NODE)
        .args(RUN)
        .arg("--rm")
        .args(ground.engine.security(&container.security))
        .args(options)
        .arg(format!("docker.io/library/{}", container.image))
        .args(&container.args)
        .output()?;
    let said = String::from_utf8_lossy(&done.stdout);
    let lines: Vec<&str> = said.lines().collect();
    let [before, mounted, after, again] = lines[..] else {
        bail!("it said {said}{}", String::from_utf8_lossy(&done.stderr));
    };
    ensure!(
        before == "sysfs" && mounted.contains("mounted for") && after == "bpf_fs" && again.contains("there already"),
        "it said {said}{}",
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}
