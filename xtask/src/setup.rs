//! A fresh machine: finds what a verb needs, installs what is missing after saying so, and explains itself where it cannot.
//!
//! Nothing is asked of the network while everything is there. What is installed comes from the machine's own package
//! sources: apt, rustup, crates.io, the Go module proxy.

mod go;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use proxy_tests::golang::{self, Goal};

use crate::command::{self, ask, check, command, find};

/// A program that comes with a Debian package.
#[derive(Clone, Copy, Debug)]
pub struct Tool {
    pub program: &'static str,
    pub package: &'static str,
    pub why: &'static str,
}

/// For worlds of network namespaces.
pub const WORLD: [Tool; 2] = [
    Tool { program: "ip", package: "iproute2", why: "makes namespaces, links and routes" },
    Tool { program: "nsenter", package: "util-linux", why: "starts programs inside a namespace" },
];

/// What the namespace suites compare with and look through.
pub const NETNS_SUITES: [Tool; 7] = [
    Tool { program: "nft", package: "nftables", why: "rules of kube-proxy's kind beside ours" },
    Tool { program: "iptables", package: "iptables", why: "network policies as CNIs write them" },
    Tool { program: "ipset", package: "ipset", why: "sets as others, and kube-proxy's IPVS mode, have them" },
    Tool { program: "conntrack", package: "conntrack", why: "shows what the kernel's own table saw" },
    Tool { program: "ethtool", package: "ethtool", why: "switches off checksum offload on test links" },
    Tool { program: "strace", package: "strace", why: "shows what the agent writes to maps" },
    Tool { program: "tcpdump", package: "tcpdump", why: "shows packets where a test failed" },
];

/// For machines with other kernels.
pub const VM: [Tool; 4] = [
    Tool { program: "qemu-system-x86_64", package: "qemu-system-x86", why: "emulates a machine for another kernel" },
    Tool { program: "modprobe", package: "kmod", why: "loads modules inside it" },
    Tool { program: "ipvsadm", package: "ipvsadm", why: "reads inside it what our codec wrote" },
    Tool { program: "strip", package: "binutils", why: "makes programs small that go into it" },
];

/// For fetching a kernel.
pub const VM_KERNELS: [Tool; 3] = [
    Tool { program: "dpkg-deb", package: "dpkg", why: "unpacks a kernel's package" },
    Tool { program: "xz", package: "xz-utils", why: "unpacks a kernel's modules" },
    Tool { program: "depmod", package: "kmod", why: "says which modules need which" },
];

/// For images: built, and started.
pub const PODMAN: [Tool; 2] = [
    Tool { program: "podman", package: "podman", why: "builds and starts container images" },
    Tool { program: "crun", package: "crun", why: "starts containers that share a cgroup with who starts them" },
];

/// Rules of alerts are checked with this, out of a package that is not installed: that would start a server.
const PROMTOOL: Tool = Tool { program: "promtool", package: "prometheus", why: "checks the rules of alerts" };

/// For a whole cluster: what its nodes run, and what goes into images.
pub const CLUSTER: [Tool; 9] = [
    Tool { program: "containerd", package: "containerd", why: "runs the containers of a cluster's pods" },
    Tool { program: "runc", package: "runc", why: "starts containers" },
    Tool { program: "curl", package: "curl", why: "asks from inside pods" },
    Tool { program: "wget", package: "wget", why: "asks from inside pods" },
    Tool { program: "nc", package: "netcat-openbsd", why: "asks from inside pods" },
    Tool { program: "nslookup", package: "bind9-dnsutils", why: "resolves names inside pods" },
    Tool { program: "bash", package: "bash", why: "a shell inside pods" },
    Tool { program: "ps", package: "procps", why: "shows processes inside pods" },
    Tool { program: "ldd", package: "libc-bin", why: "says which libraries go into an image" },
];

pub const ETCD: Tool = Tool { program: "etcd", package: "etcd-server", why: "storage of the test API server" };

/// Debian's package is old, but renders a kustomization.
pub const KUBECTL: Tool =
    Tool { program: "kubectl", package: "kubernetes-client", why: "renders manifests, talks to the test API server" };

/// Installs the packages of those tools that are missing, in one go.
pub fn tools(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| find(tool.program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for tool in &missing {
        eprintln!("setup: {} is missing, installing {} ({})", tool.program, tool.package, tool.why);
    }
    let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    apt_install(&packages)?;
    if let Some(tool) = missing.iter().find(|tool| find(tool.program).is_none()) {
        bail!("installed {} but there is still no `{}` on PATH", tool.package, tool.program);
    }
    Ok(())
}

fn apt_install(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    if find("apt-get").is_none() {
        bail!("there is no apt-get here: install the equivalent of `{names}` yourself and run this again");
    }
    apt_update()?;
    let mut install = apt(&["install", "--no-install-recommends"], &format!("installing {names}"))?;
    check(install.args(packages))
        .with_context(|| format!("cannot install {names}: install them yourself and run this again"))
}

fn apt(args: &[&str], why: &str) -> Result<Command> {
    let mut apt = command::as_root("env", why)?;
    apt.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300"]).args(args);
    apt.stdin(Stdio::null()).stdout(Stdio::null());
    Ok(apt)
}

pub fn apt_update() -> Result<()> {
    check(&mut apt(&["update"], "refreshing the package lists")?)
        .context("cannot refresh the package lists: is there a way to the package mirror?")
}

/// Downloads the newest of a package into a directory, and does not install it.
pub fn download(package: &str, into: &Path) -> Result<PathBuf> {
    fs::create_dir_all(into).with_context(|| format!("cannot create {}", into.display()))?;
    // As whom we are: apt's own user may not write here.
    check(command("apt-get").args(["-q", "-o", "APT::Sandbox::User=root", "download", package]).current_dir(into))
        .with_context(|| format!("cannot fetch {package}: is there a way to the package mirror?"))?;
    fs::read_dir(into)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get downloaded nothing for {package}"))
}

/// promtool: the one on PATH, else out of Debian's package.
pub fn promtool() -> Result<PathBuf> {
    let Tool { program, package, why } = PROMTOOL;
    if let Some(present) = find(program) {
        return Ok(present);
    }
    let kept = command::target_dir().join("tools").join(program);
    if kept.is_file() {
        return Ok(kept);
    }
    eprintln!("setup: {program} is missing, unpacking it out of {package}, 20 MB ({why})");
    let part = command::target_dir().join("tools/.part");
    if part.exists() {
        fs::remove_dir_all(&part).with_context(|| format!("cannot remove {}", part.display()))?;
    }
    let archive = match download(package, &part) {
        Ok(archive) => archive,
        Err(_) => {
            apt_update()?;
            download(package, &part)?
        }
    };
    check(command("dpkg-deb").arg("-x").arg(&archive).arg(part.join("tree")))?;
    // It appears whole, or not at all.
    fs::rename(part.join("tree/usr/bin").join(program), &kept)
        .with_context(|| format!("{package} holds no {program}"))?;
    fs::remove_dir_all(&part).with_context(|| format!("cannot remove {}", part.display()))?;
    Ok(kept)
}

/// What builds eBPF here.
#[derive(Debug)]
pub struct BpfToolchain {
    /// Compiler to use instead of the active one.
    pub rustc: Option<PathBuf>,
    /// The LLVM that bpf-linker is to load.
    pub llvm: PathBuf,
}

/// The last release of bpf-linker that uses rustc's own LLVM; later ones want a system LLVM beside it.
const BPF_LINKER: &str = "0.10.3";

/// Oldest compiler that takes this workspace (`rust-version`).
const RUST_VERSION: (u32, u32) = (1, 95);

const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// Finds, or installs, a compiler that comes with the sources of its own `core` (no BPF target ships prebuilt), and bpf-linker.
pub fn bpf_toolchain() -> Result<BpfToolchain> {
    let rustc = match present_compiler() {
        Some(compiler) => compiler,
        None => install_compiler()?,
    };
    let active = active_rustc();
    let compiler = rustc.as_deref().unwrap_or(&active);
    // Bitcode is read by the LLVM that made it, or by a newer one.
    let llvm = llvm_library(compiler).or_else(|| {
        let (made, read) = (llvm_version(compiler)?, llvm_version(&active)?);
        if made.0 <= read.0 { llvm_library(&active) } else { None }
    });
    let Some(llvm) = llvm else {
        bail!(
            "bpf-linker loads the LLVM of the compiler, but no libLLVM was found that belongs to {} or is newer; \
             `rustup update` brings one",
            compiler.display()
        );
    };
    bpf_linker()?;
    Ok(BpfToolchain { rustc, llvm })
}

/// `Some(None)`: the active compiler will do.
fn present_compiler() -> Option<Option<PathBuf>> {
    if has_core_sources(&active_rustc()) {
        return Some(None);
    }
    let debian = Path::new(DEBIAN_RUSTC);
    let recent = debian.is_file() && version(debian).is_some_and(|v| v >= RUST_VERSION);
    (recent && has_core_sources(debian)).then(|| Some(debian.to_owned()))
}

/// By name, so that rustup's proxy resolves it as it does for cargo.
fn active_rustc() -> PathBuf {
    PathBuf::from("rustc")
}

fn sysroot(rustc: &Path) -> Option<PathBuf> {
    ask(command(rustc).args(["--print", "sysroot"])).map(PathBuf::from)
}

fn has_core_sources(rustc: &Path) -> bool {
    // Cargo's build-std wants the lock file of the library workspace beside the sources.
    sysroot(rustc).is_some_and(|sysroot| {
        let library = sysroot.join("lib/rustlib/src/rust/library");
        library.join("core/Cargo.toml").is_file() && library.join("Cargo.lock").is_file()
    })
}

/// Major and minor number in text like `rustc 1.95.0 (…)`.
fn version(rustc: &Path) -> Option<(u32, u32)> {
    let text = ask(command(rustc).arg("--version"))?;
    numbers(text.split_whitespace().nth(1)?)
}

fn llvm_version(rustc: &Path) -> Option<(u32, u32)> {
    let text = ask(command(rustc).args(["--version", "--verbose"]))?;
    numbers(text.lines().find_map(|line| line.strip_prefix("LLVM version: "))?)
}

fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The LLVM that a compiler uses: beside it (rustup), or where the distribution keeps it (which may hold older ones too).
fn llvm_library(rustc: &Path) -> Option<PathBuf> {
    let sysroot = sysroot(rustc)?;
    let (major, minor) = llvm_version(rustc)?;
    let dirs = [
        sysroot.join("lib"),
        sysroot.join(format!("lib/{}-linux-gnu", std::env::consts::ARCH)),
        PathBuf::from(format!("/usr/lib/llvm-{major}/lib")),
    ];
    let name = format!("libLLVM.so.{major}.{minor}");
    let old_name = format!("libLLVM-{major}.so");
    dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flat_map(|files| files.flatten().map(|file| file.path())).find(
        |path| {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            // rustup leaves a linker script of a few bytes beside the library.
            let is_library = fs::metadata(path).is_ok_and(|meta| meta.len() > 1 << 20);
            is_library && (file.starts_with(&name) || file.starts_with(&old_name))
        },
    )
}

fn install_compiler() -> Result<Option<PathBuf>> {
    let mut tried = Vec::new();
    if find("rustup").is_some() {
        eprintln!(
            "setup: the sources of `core` are missing, trying `rustup component add rust-src` (eBPF needs `core` built for its target)"
        );
        // Where rustup's server is out of reach it retries for minutes; Debian's packages are the better bet by then.
        let added = finishes_within(command("rustup").args(["component", "add", "rust-src"]), Duration::from_secs(90))?;
        if let (true, Some(compiler)) = (added, present_compiler()) {
            return Ok(compiler);
        }
        tried.push("`rustup component add rust-src` did not succeed (it needs rustup's own server)".to_owned());
    } else {
        tried.push("rustup is not installed".to_owned());
    }
    eprintln!("setup: installing rustc-web and rust-web-src (Debian's pair of a recent compiler and its sources)");
    match apt_install(&["rustc-web", "rust-web-src"]) {
        Ok(()) => match present_compiler() {
            Some(compiler) => return Ok(compiler),
            None => tried.push(format!(
                "rustc-web and rust-web-src are installed, but {DEBIAN_RUSTC} is older than {}.{} or its sources are not beside it",
                RUST_VERSION.0, RUST_VERSION.1
            )),
        },
        Err(error) => tried.push(format!("Debian's rustc-web and rust-web-src: {error:#}")),
    }
    bail!(
        "no compiler here can build eBPF: it takes the sources of `core` that belong to the compiler.\n  - {}\n\
         Either of these does it: `rustup component add rust-src`, or `apt-get install rustc-web rust-web-src` on Debian 12 or later.",
        tried.join("\n  - ")
    )
}

/// Runs a command that may hang on the network; a command that took too long is ended and has failed.
fn finishes_within(command: &mut Command, limit: Duration) -> Result<bool> {
    let mut child = command
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start `{}`", command::display(command)))?;
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if start.elapsed() > limit {
            eprintln!("setup: no answer within {} s, giving up on it", limit.as_secs());
            child.kill()?;
            child.wait()?;
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn bpf_linker() -> Result<()> {
    if let Some(present) = ask(command("bpf-linker").arg("--version")) {
        if !present.ends_with(BPF_LINKER) {
            eprintln!("setup: note: found {present}; this repository is tried with {BPF_LINKER}");
        }
        return Ok(());
    }
    cargo_install("bpf-linker", BPF_LINKER, "links the eBPF object; takes a minute")
}

/// Reads the `deny.toml` and the lock file of this workspace; needs Rust 1.88 itself.
const CARGO_DENY: &str = "0.20.2";

/// Any version will do that reads our `deny.toml`.
pub fn cargo_deny() -> Result<()> {
    if find("cargo-deny").is_some() {
        return Ok(());
    }
    cargo_install("cargo-deny", CARGO_DENY, "checks licences and banned crates; takes a minute or two, once")
}

/// Not optimised: built in less than half the time, and what these do here takes seconds all the same (linking is LLVM's work).
fn cargo_install(program: &str, version: &str, why: &str) -> Result<()> {
    eprintln!("setup: installing {program} {version} with cargo ({why})");
    // Its own target directory, so that a cached `target/` makes a second machine quick.
    let target_dir = command::target_dir().join(program);
    fs::create_dir_all(&target_dir).with_context(|| format!("cannot create {}", target_dir.display()))?;
    check(
        command::cargo()
            .args(["install", "--locked", "--quiet", "--debug", "--config", "profile.dev.debug=false"])
            .args(["--version", version, program, "--target-dir"])
            .arg(&target_dir)
            .env_remove("RUSTFLAGS"),
    )
    .with_context(|| format!("cannot install {program}; `cargo install {program}@{version} --locked` shows why"))?;
    if find(program).is_none() {
        bail!("{program} was installed but is not on PATH: add cargo's bin directory (usually ~/.cargo/bin) to PATH");
    }
    Ok(())
}

/// Kubernetes' own programs that the suites start, as long as they are to be built.
pub struct Servers {
    builds: Vec<(Goal, &'static str)>,
    go: Option<PathBuf>,
}

/// What the API server suite and the conformance suite run: kubectl, conntrack, etcd, kube-apiserver and kube-proxy. The servers
/// come out of KUBEBUILDER_ASSETS; else etcd from the distribution, and kube-apiserver built with Go, not within the suite's time
/// limit. kube-proxy is built, too, unless KUBE_PROXY_BIN names one.
///
/// Installs all but what is built; that takes [`Servers::build`], beside whatever else there is to do.
pub fn api_server() -> Result<Servers> {
    tools(&[KUBECTL])?;
    tools(&NETNS_SUITES)?;
    let given = |name: &str| std::env::var_os(name).is_some();
    let mut builds = Vec::new();
    if !given("KUBEBUILDER_ASSETS") {
        tools(&[ETCD])?;
        builds.push((golang::APISERVER.quick(), "KUBEBUILDER_ASSETS (a directory with etcd and kube-apiserver)"));
    }
    if !given("KUBE_PROXY_BIN") {
        builds.push((golang::KUBE_PROXY.quick(), "KUBE_PROXY_BIN (the program)"));
    }
    let mut missing = false;
    for (goal, _) in &builds {
        missing |= !goal.is_built()?;
    }
    let go = if missing { go::program().inspect_err(|error| eprintln!("setup: no Go: {error:#}")).ok() } else { None };
    Ok(Servers { builds, go })
}

impl Servers {
    /// What cannot be had lets suites skip, which fails in CI: this says why, and ends nothing that could run without it.
    pub fn build(self) {
        for (goal, variable) in self.builds {
            let go = || self.go.clone().context("there is no Go to build it with");
            if let Err(error) = goal.build(go) {
                eprintln!(
                    "setup: no {} to test with: {error:#}\nsetup: or point {variable} at what you have",
                    goal.name
                );
            }
        }
    }
}

/// helm: the one on PATH, else built with Go.
pub fn helm() -> Result<PathBuf> {
    find("helm").map_or_else(|| golang::HELM.quick().build(go::program), Ok)
}

/// What a whole cluster takes beside what is built for it.
pub fn cluster() -> Result<()> {
    tools(&WORLD)?;
    tools(&NETNS_SUITES)?;
    tools(&CLUSTER)?;
    tools(&[KUBECTL])?;
    if std::env::var_os("KUBEBUILDER_ASSETS").is_none() {
        tools(&[ETCD])?;
    }
    // Debian keeps these where no PATH leads.
    if !Path::new("/usr/lib/cni/ptp").is_file() {
        eprintln!("setup: /usr/lib/cni/ptp is missing, installing containernetworking-plugins (connects pods)");
        apt_install(&["containernetworking-plugins"])?;
    }
    Ok(())
}

/// A Go that builds Kubernetes.
pub fn go_program() -> Result<PathBuf> {
    go::program()
}

/// The one that `KUBE_PROXY_BIN` names, else built with Go.
pub fn kube_proxy() -> Result<PathBuf> {
    std::env::var_os("KUBE_PROXY_BIN")
        .map_or_else(|| golang::KUBE_PROXY.build(go::program), |given| Ok(PathBuf::from(given)))
}
