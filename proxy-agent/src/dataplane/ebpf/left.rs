//! Pods whose sockets are left alone at connect time, told by their cgroups.
//!
//! The kubelet makes a cgroup for each pod, whatever runs its containers, before any process of it is started, and names it by the pod's
//! uid, which the API server tells. So it is known in time, and found without entering anything of the pod's. The programs look at the
//! caller's cgroup and those above it.
//!
//! A pod's cgroup comes after the pod was told; after a reboot, when all are told at once, by minutes. The kernel tells of each new one
//! (inotify on the directories that hold them), which is asked for ten times a second while anyone is missing. Where inotify cannot be had
//! (its instances and watches are limited, and shared by all of root's), the directories are read after longer and longer pauses.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::{
    layout::MapName,
    pins::Layout,
    sys::{self, Map},
};
use crate::desired::LeftPods;

/// While a pod is missing: between two questions whether there are new cgroups.
const SOON: Duration = Duration::from_millis(100);
/// Between two looks that nothing calls for, at the longest; and when all are found, since a cgroup may be made anew.
const LATER: Duration = Duration::from_secs(10);
/// One that is not found for so long is said.
const LONG: Duration = Duration::from_secs(30);
/// Kubelets nest theirs 3 or 4 deep, in a node that is a container itself a few more.
const DEPTH: usize = 10;

#[derive(Debug)]
pub(crate) struct Left {
    map: PathBuf,
    /// Where pods' cgroups are looked for; `None`: connect-time programs are attached nowhere.
    root: Option<PathBuf>,
    /// Not known before it was said: what an earlier run left stands.
    wanted: Option<LeftPods>,
    /// Since when each is looked for, of those that are not found.
    missing: BTreeMap<Arc<str>, Duration>,
    due: Option<Duration>,
    pause: Duration,
    failure: Option<String>,
    news: News,
}

impl Left {
    pub(crate) fn new(layout: &Layout, root: Option<PathBuf>) -> Self {
        let map = layout.map(MapName::LeftPods);
        Self {
            map,
            root,
            wanted: None,
            missing: BTreeMap::new(),
            due: None,
            pause: SOON,
            failure: None,
            news: News::default(),
        }
    }

    pub(crate) fn set(&mut self, wanted: &LeftPods, now: Duration) {
        if self.wanted.as_ref() != Some(wanted) {
            self.wanted = Some(wanted.clone());
            self.news.deaf = false;
            self.missing.retain(|uid, _| wanted.contains_key(uid));
            self.pause = SOON;
            self.due = Some(now);
        }
    }

    /// Does what is due; how long until there is more to do.
    pub(crate) fn tick(&mut self, now: Duration) -> Option<Duration> {
        if self.due.is_some_and(|due| due <= now) || (!self.missing.is_empty() && self.news.are_there()) {
            let result = self.place(now);
            self.failure = result.as_ref().err().map(|error| format!("cannot be told to the programs: {error}"));
            let waits = result.is_err() || !self.missing.is_empty();
            self.pause = if waits { (self.pause * 5 / 4).min(LATER) } else { LATER };
            let idle = !waits && self.wanted.as_ref().is_none_or(LeftPods::is_empty);
            self.due = (!idle).then_some(now + self.pause);
        }
        let due = self.due.map(|due| due.saturating_sub(now));
        let listens = !self.missing.is_empty() && self.news.inotify.is_some();
        if listens { Some(due.unwrap_or(SOON).min(SOON)) } else { due }
    }

    /// Brings the map to those that are there; leaves it alone where that cannot be told.
    fn place(&mut self, now: Duration) -> io::Result<()> {
        let (Some(wanted), Some(root)) = (&self.wanted, &self.root) else { return Ok(()) };
        let mut found = BTreeMap::new();
        if wanted.is_empty() {
            self.news = News::default();
        } else {
            self.news.open();
            find(root, DEPTH, wanted, &mut self.news, &mut found)?;
        }
        let there: BTreeSet<&Arc<str>> = found.values().collect();
        self.missing.retain(|uid, _| !there.contains(uid));
        for uid in wanted.keys().filter(|uid| !there.contains(uid)) {
            self.missing.entry(Arc::clone(uid)).or_insert(now);
        }
        let map: Map<u64, u32> = sys::open(&self.map).and_then(Map::new)?;
        let present: BTreeSet<u64> = map.entries()?.into_iter().map(|(id, _)| id).collect();
        for id in found.keys().filter(|id| !present.contains(id)) {
            map.put(id, &1, sys::ANY)?;
        }
        for id in present.iter().filter(|id| !found.contains_key(id)) {
            map.remove(id)?;
        }
        Ok(())
    }

    /// What is asked for and cannot be had, or not yet although it should.
    pub(crate) fn complaint(&self, now: Duration) -> Option<String> {
        if let Some(failure) = &self.failure {
            return Some(failure.clone());
        }
        let wanted = self.wanted.as_ref()?;
        let lost = self.missing.iter().filter(|(_, since)| now.saturating_sub(**since) >= LONG);
        let names: Vec<&str> = lost.filter_map(|(uid, _)| wanted.get(uid).map(|name| &**name)).collect();
        (!names.is_empty()).then(|| {
            format!(
                "{} {} no cgroup of that uid below {}, so connections are translated at connect time; the kubelet has to use cgroup v2, and \
                 the node's /sys/fs/cgroup has to be the one that the agent sees",
                names.join(", "),
                if names.len() == 1 { "has" } else { "have" },
                self.root.as_deref().unwrap_or(Path::new("")).display()
            )
        })
    }
}

/// What the kernel tells of new directories.
#[derive(Debug, Default)]
struct News {
    /// None: it tells nothing, or not of all.
    inotify: Option<OwnedFd>,
    /// It cannot be had, and is not asked for again with each walk.
    deaf: bool,
}

impl News {
    fn open(&mut self) {
        if self.inotify.is_none() && !self.deaf {
            self.inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok();
            self.deaf = self.inotify.is_none();
        }
    }

    /// To be told of what comes in this directory from now on.
    fn watch(&mut self, dir: &Path) {
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        if let Some(inotify) = &self.inotify
            && let Err(error) = inotify::add_watch(inotify, dir, flags)
            && !is_gone(&error.into())
        {
            (self.inotify, self.deaf) = (None, true);
        }
    }

    /// That are known of, since this was asked last.
    fn are_there(&self) -> bool {
        let Some(inotify) = &self.inotify else { return false };
        let (mut buffer, mut any) = ([0_u8; 4096], false);
        while rustix::io::read(inotify, buffer.as_mut_slice()).is_ok_and(|length| length > 0) {
            any = true;
        }
        any
    }
}

/// Not there any more, of all that can be wrong with a file.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENOTDIR))
}

/// `None`: it went away meanwhile.
fn there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(it) => Ok(Some(it)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Cgroups of pods, by id, which is the inode's number. Fails where there may be some that cannot be seen.
fn find(
    dir: &Path,
    depth: usize,
    wanted: &LeftPods,
    news: &mut News,
    found: &mut BTreeMap<u64, Arc<str>>,
) -> io::Result<()> {
    news.watch(dir);
    let Some(entries) = there(fs::read_dir(dir))? else { return Ok(()) };
    for entry in entries {
        let Some(entry) = there(entry)? else { continue };
        if !there(entry.file_type())?.is_some_and(|kind| kind.is_dir()) {
            continue;
        }
        match entry.file_name().to_str().and_then(uid) {
            Some(uid) => {
                if let Some((uid, _)) = wanted.get_key_value(uid.as_str())
                    && let Some(metadata) = there(entry.metadata())?
                {
                    found.insert(metadata.ino(), Arc::clone(uid));
                }
            }
            None if depth > 1 => find(&entry.path(), depth - 1, wanted, news, found)?,
            None => {}
        }
    }
    Ok(())
}

/// Of `pod<uid>`, or `kubepods-burstable-pod<uid with underscores>.slice`, as the kubelet's two drivers name them.
fn uid(cgroup: &str) -> Option<String> {
    let name = cgroup.strip_suffix(".slice").unwrap_or(cgroup);
    let at = name.rfind("pod")?;
    let (before, uid) = (name.get(..at)?, name.get(at + 3..)?);
    let is_uid = uid.len() >= 32 && uid.chars().all(|c| c.is_ascii_hexdigit() || matches!(c, '-' | '_'));
    (is_uid && (before.is_empty() || before.ends_with('-'))).then(|| uid.replace('_', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f7a8d6c-58d4-4a3b-9d4e-5a1f1c2b3d4e";

    #[test]
    fn cgroups_of_both_drivers_and_of_static_pods() {
        let systemd = format!("kubepods-burstable-pod{}.slice", UID.replace('-', "_"));
        let hash = "3f1c2b3d4e5a6b7c8d9e0f1a2b3c4d5e";
        for (name, expected) in [
            (format!("pod{UID}"), Some(UID)),
            (systemd, Some(UID)),
            (format!("kubelet-kubepods-pod{}.slice", UID.replace('-', "_")), Some(UID)),
            (format!("pod{hash}"), Some(hash)),
            ("kubepods.slice".into(), None),
            ("kubepods".into(), None),
            ("system.slice".into(), None),
            (format!("cri-containerd-{UID}.scope"), None),
            (format!("tripod{UID}"), None),
        ] {
            assert_eq!(uid(&name).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn pods_are_found_and_nothing_is_looked_for_in_them() {
        let root = tempfile::tempdir().unwrap();
        let guaranteed = root.path().join(format!("kubepods/pod{UID}"));
        let other = UID.replace("0f", "1e");
        let burstable = root.path().join(format!("kubepods/burstable/pod{other}"));
        fs::create_dir_all(guaranteed.join(format!("pod{other}"))).unwrap();
        fs::create_dir_all(&burstable).unwrap();
        let wanted: LeftPods = [UID, &other].map(|uid| (uid.into(), "a/b".into())).into();
        let mut found = BTreeMap::new();
        find(root.path(), DEPTH, &wanted, &mut News::default(), &mut found).unwrap();
        let ino = |path: &Path| fs::metadata(path).unwrap().ino();
        let expected = [(ino(&guaranteed), UID), (ino(&burstable), other.as_str())];
        assert_eq!(found, expected.map(|(ino, uid)| (ino, uid.into())).into());
        found.clear();
        find(root.path(), 2, &wanted, &mut News::default(), &mut found).unwrap();
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn who_is_not_found_is_waited_for_and_said() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::of(root.path());
        let mut left = Left::new(&layout, Some(root.path().to_owned()));
        assert_eq!((left.tick(Duration::ZERO), left.complaint(LONG)), (None, None));
        left.wanted = Some([(UID.into(), "mesh/a".into())].into());
        left.missing.insert(UID.into(), Duration::ZERO);
        assert_eq!(left.complaint(Duration::from_secs(1)), None);
        assert!(left.complaint(LONG).unwrap().starts_with("mesh/a has no cgroup"));
        left.due = Some(Duration::ZERO);
        let mut now = Duration::ZERO;
        while now < LONG {
            let pause = left.tick(now).unwrap();
            assert!(pause <= SOON, "{pause:?}");
            now += pause;
        }
        // It is asked after new ones as often as before; a walk without any comes less and less often.
        assert!(left.pause > LONG / 10, "{:?}", left.pause);
        // There is no map here.
        assert!(left.complaint(now).unwrap().contains("cannot be told"));
        left.set(&LeftPods::new(), now);
        assert_eq!(left.missing.len(), 0);
    }

    #[test]
    fn a_cgroup_that_comes_late_is_found_at_once() {
        let root = tempfile::tempdir().unwrap();
        let mut left = Left::new(&Layout::of(root.path()), Some(root.path().to_owned()));
        left.set(&[(UID.into(), "mesh/a".into())].into(), Duration::ZERO);
        let mut now = Duration::ZERO;
        while now < LONG {
            now += left.tick(now).unwrap();
        }
        assert!(left.due.unwrap() > now + SOON * 2, "{:?} {now:?}", left.due);
        // Those above it come late, too.
        for (dir, missing) in [("kubepods", 1), ("kubepods/burstable", 1), (&format!("kubepods/burstable/pod{UID}"), 0)]
        {
            fs::create_dir(root.path().join(dir)).unwrap();
            now += SOON;
            left.tick(now);
            assert_eq!(left.missing.len(), missing, "{dir}");
        }
    }

    /// A walk over all cgroups ten times a second would hold up every Service.
    #[test]
    fn without_inotify_walks_come_less_and_less_often() {
        let root = tempfile::tempdir().unwrap();
        let mut left = Left::new(&Layout::of(root.path()), Some(root.path().to_owned()));
        left.set(&[(UID.into(), "mesh/a".into())].into(), Duration::ZERO);
        left.tick(Duration::ZERO);
        // A directory that cannot be watched, and is not gone either.
        left.news.watch(Path::new(&"x".repeat(5000)));
        assert!(left.news.inotify.is_none());
        let (mut now, mut turns) = (left.due.unwrap(), 0);
        while now < LONG {
            now += left.tick(now).unwrap();
            turns += 1;
            assert!(left.news.inotify.is_none(), "it is asked for with each walk");
        }
        assert!((10..30).contains(&turns), "{turns}");
        fs::create_dir(root.path().join(format!("pod{UID}"))).unwrap();
        left.tick(now);
        assert_eq!(left.missing.len(), 0);
        // Others are wanted: it may be to be had by now.
        left.set(&[("1".repeat(32).into(), "mesh/b".into())].into(), now);
        left.tick(now);
        assert!(left.news.inotify.is_some());
    }

    /// What cannot be seen may be there: nothing is taken away for it.
    #[test]
    fn a_directory_that_cannot_be_read_is_not_an_empty_one() {
        let root = tempfile::tempdir().unwrap();
        let wanted: LeftPods = [(UID.into(), "a/b".into())].into();
        let look = |dir: &Path| find(dir, DEPTH, &wanted, &mut News::default(), &mut BTreeMap::new());
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        look(&file).unwrap();
        look(&root.path().join("nowhere")).unwrap();
        assert!(look(&root.path().join("x".repeat(5000))).is_err());
        for (code, gone) in [(libc::EMFILE, false), (libc::ENOMEM, false), (libc::EACCES, false), (libc::ENODEV, true)]
        {
            let result = there(Err::<(), _>(io::Error::from_raw_os_error(code)));
            assert_eq!(result.is_ok(), gone, "{code}");
        }
    }
}
