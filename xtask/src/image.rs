//! `image`: the agent as a container image, without a registry: of a static binary, and for the variant with tools of the
//! distribution's packages, unpacked.
//!
//! The binary is linked against the C library's static archive (`+crt-static`): rustup's and Debian's standard libraries hold all that
//! takes, while musl's would be one more target to fetch. Names are resolved by what glibc has built in, files and DNS.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::podman::Podman;

use crate::{
    build_ebpf,
    command::{self, check, command, output},
    setup,
};

/// What the manifests call it, whole: so an archive that is imported on a node is found there.
const NAME: &str = "docker.io/library/proxy-agent";

/// In the image with tools; what these need comes along.
const PACKAGES: [&str; 2] = ["nftables", "iptables"];

/// Of packages, what no program reads there.
const UNREAD: [&str; 8] = [
    "usr/include",
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/zsh",
];

#[derive(clap::Args)]
pub struct Args {
    /// With nft and iptables, for the modes nftables, iptables and ipvs
    #[arg(long)]
    tools: bool,

    /// Where the archive goes [default: target/image/proxy-agent.tar, or proxy-agent-tools.tar]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// What it is called, but for the tag: the version, with -tools behind it
    #[arg(long, value_name = "NAME", default_value = NAME)]
    name: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Variant {
    Agent,
    Tools,
}

impl Variant {
    const BOTH: [Self; 2] = [Self::Agent, Self::Tools];

    /// As the Dockerfile calls it.
    fn target(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Tools => "tools",
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Agent => "",
            Self::Tools => "-tools",
        }
    }

    fn archive(self) -> String {
        format!("proxy-agent{}.tar", self.suffix())
    }
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let Args { tools, output, name } = args;
    let variant = if *tools { Variant::Tools } else { Variant::Agent };
    setup::tools(&setup::PODMAN)?;
    let place = command::target_dir().join("image");
    let binary = release()?;
    let archive = match output {
        Some(file) => std::path::absolute(file).with_context(|| format!("{} is no path", file.display()))?,
        None => place.join(variant.archive()),
    };
    make(&place, &binary, variant, name, &archive)?;
    println!("{}", archive.display());
    Ok(ExitCode::SUCCESS)
}

/// The release binary, and the archive of its image, for whoever runs them.
pub fn built() -> Result<(PathBuf, PathBuf)> {
    setup::tools(&setup::PODMAN)?;
    let place = command::target_dir().join("image");
    let (binary, archive) = (release()?, place.join(Variant::Agent.archive()));
    make(&place, &binary, Variant::Agent, NAME, &archive)?;
    Ok((binary, archive))
}

/// The release binary, static. Only its last step differs from [`crate::build::agent`]'s: all else is shared with that.
fn release() -> Result<PathBuf> {
    let object = build_ebpf::object()?;
    let mut cargo = command::cargo();
    cargo
        .args(["rustc", "--locked", "--release", "--package", "proxy-agent", "--bin", "proxy-agent"])
        .args(["--", "-C", "target-feature=+crt-static"])
        .env(build_ebpf::OBJECT_VARIABLE, object);
    check(&mut cargo)?;
    Ok(command::target_dir().join("release/proxy-agent"))
}

/// The agent of the suites, static: linked again from the library that they were built with, which takes seconds.
fn linked(library: &Path, into: &Path) -> Result<PathBuf> {
    let binary = into.join("proxy-agent");
    // Cargo keeps all that it is made of beside it.
    let option = |name: &str, path: &Path| {
        let mut option = OsString::from(name);
        option.push(path);
        option
    };
    let mut rustc = command("rustc");
    rustc
        .args(["--edition=2024", "--crate-name=proxy_agent_static", "--crate-type=bin", "proxy-agent/src/main.rs"])
        .args(["-C", "target-feature=+crt-static", "-C", "strip=debuginfo", "--extern"])
        .arg(option("proxy_agent=", library))
        .arg("-L")
        .arg(option("dependency=", library.parent().context("a library in no directory")?))
        .arg("-o")
        .arg(&binary);
    check(&mut rustc)?;
    Ok(binary)
}

/// Where the suites look for [`for_tests`].
pub fn tests_directory() -> PathBuf {
    command::target_dir().join("image/tests")
}

/// Both images, of the agent that the suites run. `library`: the agent's, as they were built with it. What goes wrong lets the suite fail
/// that starts them, and is said here.
pub fn for_tests(library: &Path) {
    let place = tests_directory();
    let all = || -> Result<()> {
        setup::tools(&setup::PODMAN)?;
        fs::create_dir_all(&place).with_context(|| format!("cannot create {}", place.display()))?;
        let binary = linked(library, &place)?;
        for variant in Variant::BOTH {
            // What an earlier run left must not pass for this one's.
            remove(&place.join(variant.archive()))?;
            make(&place, &binary, variant, NAME, &place.join(variant.archive()))?;
        }
        Ok(())
    };
    if let Err(error) = all() {
        eprintln!("setup: no image to test: {error:#}");
    }
}

/// Builds an image and writes it to an archive. All that podman keeps is below `place`.
fn make(place: &Path, binary: &Path, variant: Variant, name: &str, archive: &Path) -> Result<()> {
    let context = place.join("context");
    remove(&context)?;
    let agent = context.join("agent");
    let file = |path: &str, from: &Path, mode: u32| -> Result<()> {
        let to = agent.join(path);
        fs::create_dir_all(to.parent().context("no directory")?)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(fs::set_permissions(&to, fs::Permissions::from_mode(mode))?)
    };
    file("usr/bin/proxy-agent", binary, 0o755)?;
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        file(&format!("usr/share/doc/proxy-agent/{licence}"), &command::root().join(licence), 0o644)?;
    }
    let switch = agent.join("etc/nsswitch.conf");
    fs::create_dir_all(agent.join("etc"))?;
    // Without it glibc asks DNS first, and files only if that does not answer.
    fs::write(&switch, "hosts: files dns\n").with_context(|| format!("cannot write {}", switch.display()))?;
    if variant == Variant::Tools {
        debian(&command::target_dir().join("image/debian"), &context.join("debian"))?;
    }

    let tag = format!("{name}:{}{}", env!("CARGO_PKG_VERSION"), variant.suffix());
    let store = place.join("podman");
    let podman = Podman::new(&store)?;
    let run = |args: &[&str]| -> Result<()> {
        let mut podman_command = command::as_root("podman", "building an image")?;
        podman_command.args(podman.arguments()).args(args).envs(podman.variables());
        output(&mut podman_command).map(drop)
    };
    let target = format!("--target={}", variant.target());
    let (dockerfile, context) = (command::root().join("Dockerfile"), context.to_string_lossy().into_owned());
    let dockerfile = format!("--file={}", dockerfile.display());
    // The same bytes give the same image.
    run(&["build", "--quiet", "--timestamp=0", "--isolation=chroot", &target, &dockerfile, "--tag", &tag, &context])?;
    let part = archive.with_extension("part");
    remove(&part)?;
    run(&["save", "--quiet", "--format=docker-archive", "--output", &part.to_string_lossy(), &tag])?;
    fs::rename(&part, archive).with_context(|| format!("cannot rename to {}", archive.display()))?;
    // What is in the archive is needed nowhere else.
    run(&["image", "rm", "--force", &tag])
}

/// The packages with all that they need, unpacked into a directory: what a root with nothing else in it takes to run them.
fn debian(cache: &Path, into: &Path) -> Result<()> {
    let archives = cache.join("archives");
    fs::create_dir_all(archives.join("partial")).with_context(|| format!("cannot create {}", archives.display()))?;
    // As if nothing were installed.
    let nothing = cache.join("status");
    fs::write(&nothing, "")?;
    let apt = |args: &[&str]| {
        let mut apt = command("apt-get");
        apt.args(["-q", "-y", "-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=true"]);
        apt.arg("-o").arg(format!("Dir::State::status={}", nothing.display()));
        apt.arg("-o").arg(format!("Dir::Cache::archives={}/", archives.display()));
        apt.args(["--no-install-recommends"]).args(args).args(PACKAGES);
        apt
    };
    let fetch = || output(&mut apt(&["install", "--download-only"]));
    if fetch().is_err() {
        setup::apt_update()?;
        fetch().context("cannot fetch the packages: is there a way to the package mirror?")?;
    }
    // Of what there may be from earlier days, the ones that belong together: `Inst libc6 (2.36-9+deb12u10 Debian:12 [amd64])`.
    let plan = output(&mut apt(&["install", "--simulate"]))?;
    let wanted: BTreeSet<String> = plan.lines().filter_map(package).collect();
    ensure!(wanted.len() > PACKAGES.len(), "apt-get names no packages: {plan}");
    let status = into.join("var/lib/dpkg/status.d");
    fs::create_dir_all(&status)?;
    for name in &wanted {
        let archive = archives.join(format!("{name}.deb"));
        ensure!(archive.is_file(), "apt-get left no {}", archive.display());
        check(command("dpkg-deb").arg("-x").arg(&archive).arg(into))?;
        // Where scanners look for what an image is made of.
        let control = output(command("dpkg-deb").arg("-f").arg(&archive))?;
        fs::write(status.join(name.split('_').next().unwrap_or(name)), control)?;
    }
    for unread in UNREAD {
        remove(&into.join(unread))?;
    }
    // Tables of character sets: a tenth of all, for nothing that runs there.
    let triplet = format!("usr/lib/{}-linux-gnu/gconv", std::env::consts::ARCH);
    remove(&into.join(triplet))
}

/// The file that apt-get keeps a package in, by a line of its plan.
fn package(line: &str) -> Option<String> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
    let version = rest.split(' ').next()?;
    let architecture = rest.split_once('[')?.1.split(']').next()?;
    Some(format!("{name}_{}_{architecture}", version.replace(':', "%3a")))
}

fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::package;

    #[test]
    fn the_file_of_a_package_is_known_by_its_line() {
        let line = "Inst libc6 (2.36-9+deb12u10 Debian:12.11/stable [amd64]) []";
        assert_eq!(package("Inst netbase (6.4 Debian:12.11/stable [all])").unwrap(), "netbase_6.4_all");
        assert_eq!(
            package("Inst a (1:2-3 Debian:12.11/stable, Debian-Security:12/stable-security [amd64])").unwrap(),
            "a_1%3a2-3_amd64"
        );
        assert_eq!(package("Conf libc6 (2.36-9+deb12u10 Debian:12.11/stable [amd64])"), None);
        assert_eq!(package(line).unwrap(), "libc6_2.36-9+deb12u10_amd64");
    }
}
