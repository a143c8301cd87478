//! Kubernetes' own programs, built with Go out of the modules beside this crate: `apiserver/` (what the suites run) and `cluster/`
//! (what a whole cluster takes besides). Built once (minutes), kept under `target/kube/`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::apiserver::on_path;

/// Something to build.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// What the program is called.
    pub name: &'static str,
    /// Directory of the module, below this crate.
    module: &'static str,
    package: &'static str,
    /// Where its release is asked for: a module that the one above requires.
    of: &'static str,
    /// A program of tests.
    tests: bool,
    /// Its source is the module's own: built anew when that changes, not with the release alone.
    own: bool,
    /// See [`Self::quick`].
    quick: bool,
}

/// Kubernetes' API server and node proxy, for the suites.
pub const APISERVER: Goal = Goal::new("kube-apiserver", "apiserver", "k8s.io/kubernetes/cmd/kube-apiserver");
pub const KUBE_PROXY: Goal = Goal::new("kube-proxy", "apiserver", "k8s.io/kubernetes/cmd/kube-proxy");

/// Renders the chart.
pub const HELM: Goal = Goal { of: "helm.sh/helm/v3", ..Goal::new("helm", "apiserver", "helm.sh/helm/v3/cmd/helm") };

/// The rest of a cluster.
pub const CONTROLLER_MANAGER: Goal =
    Goal::new("kube-controller-manager", "cluster", "k8s.io/kubernetes/cmd/kube-controller-manager");
pub const SCHEDULER: Goal = Goal::new("kube-scheduler", "cluster", "k8s.io/kubernetes/cmd/kube-scheduler");
pub const KUBELET: Goal = Goal::new("kubelet", "cluster", "k8s.io/kubernetes/cmd/kubelet");
/// What upstream's specs run in their pods.
pub const AGNHOST: Goal = Goal::new("agnhost", "cluster", "k8s.io/kubernetes/test/images/agnhost");
/// Another program of theirs: it answers with packets that conntrack takes for invalid.
pub const INVALID: Goal =
    Goal::new("regression-issue-74839", "cluster", "k8s.io/kubernetes/test/images/regression-issue-74839");
pub const PAUSE: Goal = Goal { own: true, ..Goal::new("pause", "cluster", "./pause") };
/// Upstream's specs, and what runs several of them at once.
pub const SPECS: Goal = Goal { own: true, tests: true, ..Goal::new("e2e.test", "cluster", ".") };
pub const GINKGO: Goal = Goal::new("ginkgo", "cluster", "github.com/onsi/ginkgo/v2/ginkgo");

impl Goal {
    const fn new(name: &'static str, module: &'static str, package: &'static str) -> Self {
        Self { name, module, package, of: "k8s.io/kubernetes", tests: false, own: false, quick: false }
    }

    /// Not optimised, which takes two thirds of the time to build: where it is asked for what it does, not for how fast. One
    /// built the long way does as well.
    pub const fn quick(self) -> Self {
        Self { quick: true, ..self }
    }

    fn source(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(self.module)
    }

    /// As the module has it.
    fn version(&self) -> Result<String> {
        let manifest = self.source().join("go.mod");
        let text = fs::read_to_string(&manifest).with_context(|| format!("read {}", manifest.display()))?;
        let required = |line: &str| {
            let line = line.trim();
            let (module, version) = line.strip_prefix("require ").unwrap_or(line).split_once(' ')?;
            (module == self.of).then(|| version.to_owned())
        };
        let version = text.lines().find_map(required);
        version.with_context(|| format!("{} requires no {}", manifest.display(), self.of))
    }

    fn built(&self) -> Result<PathBuf> {
        let own = std::env::current_exe().context("find the running program")?;
        let target = own.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
        let target = target.map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), Path::to_path_buf);
        let kept = target.join("kube").join(format!("{}-{}", self.name, self.version()?));
        if !self.quick || kept.is_file() {
            return Ok(kept);
        }
        Ok(kept.with_added_extension("quick"))
    }

    /// Whether [`Self::build`] has nothing to do.
    pub fn is_built(&self) -> Result<bool> {
        let built = self.built()?;
        if !self.own {
            return Ok(built.is_file());
        }
        let Ok(made) = fs::metadata(&built).and_then(|meta| meta.modified()) else { return Ok(false) };
        Ok(newest(&self.source())? <= made)
    }

    /// Builds it with the Go on PATH, or finds it built.
    pub fn build_with_path(&self) -> Result<PathBuf> {
        self.build(|| on_path("go").context("there is no `go` to build it with; `cargo xtask test api` brings one"))
    }

    /// Builds it at the release that the module names, or finds it built. `go` is asked for only if there is something to build.
    pub fn build(&self, go: impl FnOnce() -> Result<PathBuf>) -> Result<PathBuf> {
        let built = self.built()?;
        let dir = built.parent().context("a file below target/")?;
        // Whoever finds it need not wait for what else is being built.
        if self.is_built()? {
            return Ok(built);
        }
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        // Programs that start together should not build the same thing twice.
        let lock = File::create(dir.join("lock")).context("make target/kube/lock")?;
        let _lock =
            Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error).context("lock target/kube")?;
        if self.is_built()? {
            return Ok(built);
        }
        let go = go()?;
        let part = dir.join(format!(".{}.part", self.name));
        eprintln!("building {} {} with Go, once: this takes some minutes", self.name, self.version()?);
        let output = Command::new(go)
            .current_dir(self.source())
            // What is built was looked over by those who wrote it.
            .args(if self.tests { &["test", "-c", "-vet=off"][..] } else { &["build"] })
            .args(["-trimpath", "-ldflags", "-s -w"])
            .args(self.quick.then_some("-gcflags=all=-N -l -dwarf=false"))
            .arg("-o")
            .arg(&part)
            .arg(self.package)
            .env("CGO_ENABLED", "0")
            .env("GOTOOLCHAIN", "local")
            // It would lead this Go to another one's library.
            .env_remove("GOROOT")
            .stdin(Stdio::null())
            .output()
            .context("start go")?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            bail!("go build of {} failed: {}", self.name, text.lines().last().unwrap_or("no word why"));
        }
        fs::rename(&part, &built).with_context(|| format!("rename to {}", built.display()))?;
        Ok(built)
    }
}

/// When the last change was made to a file of the module's own.
fn newest(dir: &Path) -> Result<SystemTime> {
    let mut newest = SystemTime::UNIX_EPOCH;
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        newest = newest.max(if meta.is_dir() { self::newest(&entry.path())? } else { meta.modified()? });
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_modules_are_of_one_release() {
        assert_eq!(APISERVER.version().unwrap(), KUBELET.version().unwrap());
    }
}
