//! Kernels of the distribution: fetched, unpacked and kept below `target/vm/kernels`, one directory each.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::wanted_module;
use crate::{
    command::{self, ask, check, command},
    setup,
};

/// A kernel and its modules, ready to boot.
#[derive(Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    pub image: PathBuf,
    /// Root of a tree that holds `lib/modules/<release>`.
    pub tree: PathBuf,
}

/// The newest kernel of a series (`6.1`) that is here, or that the machine's package sources have.
pub fn bring(series: &str) -> Result<Kernel> {
    let store = command::target_dir().join("vm/kernels");
    if let Some(kernel) = kept(&store, series)? {
        return Ok(kernel);
    }
    setup::tools(&setup::VM_KERNELS)?;
    let package = match package(series)? {
        Some(package) => package,
        None => {
            setup::apt_update()?;
            package(series)?.with_context(|| {
                format!(
                    "the package sources of this machine have no linux-image-{series}*-cloud-amd64; `apt-cache search linux-image` shows \
                     what they have"
                )
            })?
        }
    };
    eprintln!("setup: fetching {package} (a kernel to test with, 30 MB)");
    fetch(&store, &package)?;
    kept(&store, series)?.with_context(|| format!("{package} holds no kernel {series}"))
}

/// What an earlier run unpacked.
fn kept(store: &Path, series: &str) -> Result<Option<Kernel>> {
    let Ok(entries) = fs::read_dir(store) else { return Ok(None) };
    let mut found = Vec::new();
    for entry in entries {
        let release = entry?.file_name().to_string_lossy().into_owned();
        if is_of(&release, series) {
            found.push(release);
        }
    }
    found.sort_by_key(|release| numbers(release));
    Ok(found.pop().map(|release| {
        let tree = store.join(&release);
        Kernel { image: tree.join("vmlinuz"), tree, release }
    }))
}

/// `6.1.0-56-cloud-amd64` is of 6.1, and `6.12.117…` is not.
fn is_of(release: &str, series: &str) -> bool {
    release.strip_prefix(series).is_some_and(|rest| rest.starts_with(['.', '-']))
}

/// The numbers in a name, so that 9 comes before 10.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// The newest package of a series, as far as the package lists here know.
fn package(series: &str) -> Result<Option<String>> {
    let names = command::output(command("apt-cache").args(["pkgnames", "linux-image-"]))?;
    let release = |name: &str| name.strip_prefix("linux-image-").map(str::to_owned);
    let fits = |name: &&str| {
        name.ends_with("-cloud-amd64") && release(name).is_some_and(|release| is_of(&release, series))
            // The meta-package of a series has nothing behind it.
            && numbers(name).len() > numbers(series).len() + 2
    };
    let mut names: Vec<&str> = names.lines().filter(fits).collect();
    names.sort_by_key(|name| numbers(name));
    // One that was installed once is known by its name, and cannot be had any more.
    let there =
        |name: &&str| ask(command("apt-cache").args(["show", name])).is_some_and(|text| text.contains("Filename:"));
    Ok(names.into_iter().rev().find(there).map(str::to_owned))
}

fn fetch(store: &Path, package: &str) -> Result<()> {
    let part = store.join(".part");
    remove(&part)?;
    let archive = setup::download(package, &part)?;
    let release = package.strip_prefix("linux-image-").context("a name that is no kernel's")?;
    let tree = part.join("tree");
    check(command("dpkg-deb").arg("-x").arg(&archive).arg(&tree))?;
    keep_what_is_wanted(&tree, release)?;
    let image = tree.join(format!("boot/vmlinuz-{release}"));
    fs::rename(&image, tree.join("vmlinuz")).with_context(|| format!("{package} holds no {}", image.display()))?;
    check(command("depmod").arg("-b").arg(&tree).arg(release))?;
    // It appears whole, or not at all.
    fs::rename(&tree, store.join(release)).with_context(|| format!("cannot keep {}", tree.display()))?;
    remove(&part)
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// Removes the modules that nothing here needs, and unpacks compressed ones: inside, each is read by an emulated CPU.
fn keep_what_is_wanted(tree: &Path, release: &str) -> Result<()> {
    // Merged or not: packages differ in where they have it.
    let from = ["lib/modules", "usr/lib/modules"].map(|at| tree.join(at)).into_iter().find(|path| path.is_dir());
    let from = from.context("a kernel package without modules")?;
    let modules = tree.join("lib/modules");
    if from != modules {
        fs::create_dir_all(tree.join("lib"))?;
        fs::rename(&from, &modules)?;
    }
    let modules = modules.join(release);
    let mut compressed = Vec::new();
    each_file(&modules.join("kernel"), &mut |path| {
        let name = path.strip_prefix(&modules).unwrap_or(path).to_string_lossy().into_owned();
        if !wanted_module(&name) {
            fs::remove_file(path)?;
        } else if name.ends_with(".xz") {
            compressed.push(path.to_owned());
        }
        Ok(())
    })?;
    for some in compressed.chunks(200) {
        check(command("xz").arg("--decompress").args(some))?;
    }
    ensure!(modules.join("kernel/net").is_dir(), "{release} comes without networking modules");
    Ok(())
}

fn each_file(directory: &Path, act: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            each_file(&entry.path(), act)?;
        } else {
            act(&entry.path())?;
        }
    }
    Ok(())
}

/// What runs here; a guest of another architecture could not run our programs.
pub fn suits_this_machine() -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("virtual machines are only prepared for x86_64 so far, and this is {}", std::env::consts::ARCH);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_told_by_whole_numbers() {
        assert!(is_of("6.1.0-56-cloud-amd64", "6.1"));
        assert!(!is_of("6.12.117+deb12-cloud-amd64", "6.1"));
        assert!(is_of("6.12.117+deb12-cloud-amd64", "6.12"));
        assert!(is_of("6.12-cloud-amd64", "6.12"));
        let mut releases = ["6.1.0-10-cloud-amd64", "6.1.0-9-cloud-amd64"];
        releases.sort_by_key(|release| numbers(release));
        assert_eq!(releases, ["6.1.0-9-cloud-amd64", "6.1.0-10-cloud-amd64"]);
    }
}
