//! A container image out of programs of this machine: no registry, no builder.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

/// One that is being put together.
pub(super) struct Image {
    name: String,
    /// Below it are its layer's `tree`, then the archive.
    dir: PathBuf,
    copied: BTreeSet<PathBuf>,
}

impl Image {
    /// `name` with its tag; it is put together in a new directory below `images`.
    pub(super) fn new(name: &str, images: &Path) -> Result<Self> {
        let dir = images.join(name.replace(['/', ':'], "_"));
        fs::create_dir_all(dir.join("tree")).with_context(|| format!("make {}", dir.display()))?;
        let mut image = Self { name: name.to_owned(), dir, copied: BTreeSet::new() };
        for below in ["tmp", "etc", "run", "proc", "sys", "dev"] {
            image.directory(below)?;
        }
        fs::set_permissions(image.at("tmp"), fs::Permissions::from_mode(0o1777))?;
        image.file("etc/passwd", "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")?;
        image.file("etc/group", "root:x:0:\nnogroup:x:65534:\n")?;
        // Else glibc asks services that nobody has here.
        image.file("etc/nsswitch.conf", "hosts: files dns\n")?;
        Ok(image)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.join("tree").join(path.trim_start_matches('/'))
    }

    pub(super) fn directory(&mut self, path: &str) -> Result<()> {
        let dir = self.at(path);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))
    }

    pub(super) fn file(&mut self, path: &str, text: &str) -> Result<()> {
        let file = self.at(path);
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))
    }

    pub(super) fn link(&mut self, path: &str, to: &str) -> Result<()> {
        let link = self.at(path);
        symlink(to, &link).with_context(|| format!("make {}", link.display()))
    }

    /// A program, or a library, with the libraries that it is linked to.
    pub(super) fn program(&mut self, from: &Path, to: &str) -> Result<()> {
        self.copy(from, to)?;
        for library in libraries(from)? {
            if self.copied.insert(library.clone()) {
                self.copy(&library, &library.to_string_lossy())?;
            }
        }
        Ok(())
    }

    /// Programs by name, from wherever they are here to `/usr/bin`.
    pub(super) fn programs(&mut self, names: &[&str]) -> Result<()> {
        for name in names {
            let from = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(|dir| Path::new(dir).join(name));
            let from = from.into_iter().find(|path| path.is_file()).with_context(|| format!("there is no `{name}`"))?;
            self.program(&from, &format!("usr/bin/{name}"))?;
        }
        Ok(())
    }

    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.at(to);
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        }
        fs::copy(from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        Ok(())
    }

    /// Writes the archive, of the form that `docker save` has. `entry`: what a container starts.
    pub(super) fn pack(self, entry: &[&str], arguments: &[&str]) -> Result<PathBuf> {
        let Self { name, dir, copied: _ } = self;
        let layer = dir.join("layer.tar");
        let own = ["--numeric-owner", "--owner=0", "--group=0", "--sort=name", "--mtime=@0", "-cf"];
        run(Command::new("tar").args(own).arg(&layer).arg("-C").arg(dir.join("tree")).arg("."))?;
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": entry, "Cmd": arguments, "Env": ["PATH=/usr/bin:/bin:/usr/sbin:/sbin"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", digest(&layer)?)]},
        });
        fs::write(dir.join("config.json"), serde_json::to_vec(&config)?)?;
        let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
        fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest)?)?;
        let archive = dir.with_extension("tar");
        run(Command::new("tar").args(own).arg(&archive).arg("-C").arg(&dir).args([
            "manifest.json",
            "config.json",
            "layer.tar",
        ]))?;
        fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
        Ok(archive)
    }
}

/// As images call it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn digest(file: &Path) -> Result<String> {
    let text = run(Command::new("sha256sum").arg(file))?;
    Ok(text.split_whitespace().next().context("sha256sum printed nothing")?.to_owned())
}

/// None for what is linked to nothing.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let done = Command::new("ldd").arg(program).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&done.stdout);
    if !done.status.success() {
        let words = String::from_utf8_lossy(&done.stderr);
        ensure!(words.contains("not a dynamic executable"), "ldd {}: {words}", program.display());
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for line in text.lines() {
        ensure!(!line.contains("not found"), "{}: {}", program.display(), line.trim());
        // `libc.so.6 => /lib/… (0x…)`, and the loader without an arrow.
        let path = line.split_once("=>").map_or(line, |(_, path)| path).trim();
        if let Some(path) = path.split(" (").next().filter(|path| path.starts_with('/')) {
            found.push(PathBuf::from(path));
        }
    }
    Ok(found)
}

fn run(command: &mut Command) -> Result<String> {
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))?;
    if !done.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}
