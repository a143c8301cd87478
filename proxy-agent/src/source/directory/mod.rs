//! A directory of ordinary Service, EndpointSlice and Node files as a source; of Pod and Namespace files, too, if they are asked for.
//!
//! Owns the files' last good state. Files are read again when the tree looks different from the last time; the kernel's
//! notification makes that prompt, a walk several times a second makes it certain (notifications miss what links lead to, and
//! networks' file systems). A file's change is taken in once two looks at it agree and it is the same after it was read, so that an
//! editor that truncates, writes and renames is not caught half-way; one that never rests delays itself alone, and is taken nevertheless
//! after a while, but never for less than it held: that may be a file caught half-written.
//!
//! - INVARIANT: a file that cannot be read or parsed keeps its last good objects; only a file that is gone takes them along.
//! - INVARIANT: an object that is there but cannot be read keeps its last good state, whatever file it is in (fault F17).
//! - INVARIANT: nothing is handed on before every file parsed once: a file that never did has no last good state, and a list
//!   without its objects would take away what an earlier run left in force.
//! - The same object in two files: the first file in path order has it, whatever came first in time.

mod files;
mod parse;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use notify::Watcher;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::{
    files::{Listing, Signature},
    parse::{Line, Object, Parsed},
};
use super::{SourceError, convert::Names};
use crate::model::{EndpointSlice, Event, NodeFacts, Pod, PodKey, Service, ServiceKey, SourceState, Teller};

/// How often the tree is looked at, come a notification or not. Changes are promised within a second.
pub(super) const LOOK: Duration = Duration::from_millis(500);
/// Two looks this far apart must agree before a change counts.
pub(super) const SETTLE: Duration = Duration::from_millis(100);
/// A file that never rests is taken as it is after so long, unless it holds less than before.
const SETTLE_MOST: Duration = Duration::from_millis(500);

type SliceKey = (Arc<str>, Arc<str>);

/// A file as last seen.
#[derive(Default)]
struct File {
    signature: Option<Signature>,
    /// It is to be read again, though it may look the same.
    again: bool,
    good: Parsed,
    /// It parsed once: `good` is its last good state.
    parsed: bool,
    /// Why `good` is not what the file says now.
    broken: Option<(Line, String)>,
}

/// The union of all files.
#[derive(Default)]
struct World {
    services: BTreeMap<ServiceKey, Arc<Service>>,
    slices: BTreeMap<SliceKey, Arc<EndpointSlice>>,
    node: NodeFacts,
    /// Of this node, and of namespaces the annotated ones.
    pods: BTreeMap<PodKey, Arc<Pod>>,
    namespaces: BTreeMap<Arc<str>, Arc<str>>,
    /// There, but unreadable, and nothing is known of them.
    unknown_services: BTreeSet<ServiceKey>,
    unknown_slices: BTreeMap<SliceKey, Option<ServiceKey>>,
    problems: BTreeMap<String, Vec<String>>,
}

struct Directory {
    root: PathBuf,
    node: Arc<str>,
    /// Pods and namespaces are asked for.
    pods: bool,
    names: Names,
    files: BTreeMap<PathBuf, File>,
    unreadable: BTreeMap<PathBuf, String>,
    /// Files that are being written, and since when they were seen to be.
    restless: BTreeMap<PathBuf, Instant>,
    /// What the last look took, waiting for files to settle not counted.
    walked: Duration,
    /// Kinds a notice was given for.
    noticed: BTreeSet<String>,
    /// It could be listed once.
    looked: bool,
    /// Why nothing may be handed on yet.
    missing: Vec<String>,
    /// What was handed on; `None` before the first complete look.
    world: Option<World>,
}

pub(super) async fn run(
    node: &str,
    pods: bool,
    root: &Path,
    events: &mpsc::Sender<Event>,
    state: &watch::Sender<SourceState>,
    cancel: &CancellationToken,
) -> Result<(), SourceError> {
    let (wake, mut woken) = mpsc::channel::<()>(1);
    let mut directory = Directory { pods, ..Directory::new(root, node) };
    // Watching starts before the first look, or a change between the two would wait for the next one.
    let _watcher = watch_tree(root, notify::RecursiveMode::Recursive, wake);
    loop {
        let looked = tokio::task::spawn_blocking(move || {
            let outcome = directory.look();
            (directory, outcome)
        });
        let Ok((back, outcome)) = looked.await else {
            return Err(SourceError::Directory { path: root.to_path_buf(), cause: "reading it ended early".into() });
        };
        directory = back;
        match outcome {
            Ok(changes) => {
                for event in changes {
                    if events.send(event).await.is_err() {
                        return Ok(());
                    }
                }
                let missing = &directory.missing;
                if directory.world.is_some() {
                    set(state, SourceState::Synced);
                } else if set(state, SourceState::Listing { missing: missing.clone() }) {
                    warn!("waiting for {}; until then nothing is changed in the kernel", missing.join(", "));
                }
            }
            Err(error) if !directory.looked => {
                return Err(SourceError::Directory { path: root.to_path_buf(), cause: error.to_string() });
            }
            // What cannot be read now was never read completely.
            Err(error) if directory.world.is_none() => {
                let missing = format!("{} (cannot be read: {error})", root.display());
                if set(state, SourceState::Listing { missing: vec![missing.clone()] }) {
                    warn!("waiting for {missing}; until then nothing is changed in the kernel");
                }
            }
            Err(error) => {
                let reason = format!("cannot read {}: {error}; the last state stands", root.display());
                if set(state, SourceState::Stale { reason: reason.clone() }) {
                    warn!("{reason}");
                }
            }
        }
        // A tree of many thousand files is looked at less often: a twentieth of one CPU at most.
        let pause = if directory.restless.is_empty() { LOOK } else { SETTLE };
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = events.closed() => return Ok(()),
            () = tokio::time::sleep(pause.max(directory.walked * 20)) => {},
            Some(()) = woken.recv() => {},
        }
    }
}

/// Tells whether that was news.
fn set(state: &watch::Sender<SourceState>, to: SourceState) -> bool {
    state.send_if_modified(|state| {
        let news = *state != to;
        *state = to;
        news
    })
}

/// Wakes whoever waits when something below `root` changes.
pub(super) fn watch_tree(
    root: &Path,
    mode: notify::RecursiveMode,
    wake: mpsc::Sender<()>,
) -> Option<impl Watcher + use<>> {
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the files raises access events: those would wake us for ever.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            let _already_awake = wake.try_send(());
        }
    });
    match watcher.and_then(|mut watcher| watcher.watch(root, mode).map(|()| watcher)) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            info!(%error, directory = %root.display(), "no change notifications, looking twice a second instead");
            None
        }
    }
}

impl Directory {
    fn new(root: &Path, node: &str) -> Self {
        Self {
            root: root.to_path_buf(),
            node: node.into(),
            pods: false,
            names: Names::default(),
            files: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            restless: BTreeMap::new(),
            walked: Duration::ZERO,
            noticed: BTreeSet::new(),
            looked: false,
            missing: Vec::new(),
            world: None,
        }
    }

    /// Looks at the tree; what changed since the last look, as events in an order that is safe to apply one by one.
    fn look(&mut self) -> std::io::Result<Vec<Event>> {
        let mut began = Instant::now();
        let mut listing = files::list(&self.root)?;
        self.walked = began.elapsed();
        if self.looked {
            if !self.differs(&listing) {
                self.restless.clear();
                return Ok(Vec::new());
            }
            std::thread::sleep(SETTLE);
            began = Instant::now();
            let overdue;
            (listing, overdue) = self.settled(&listing, files::list(&self.root)?, Instant::now());
            self.take_in(listing, &overdue);
        } else {
            self.take_in(listing, &BTreeSet::new());
        }
        self.looked = true;
        self.walked += began.elapsed();
        if self.world.is_none() {
            self.missing = self.never_read();
            if !self.missing.is_empty() {
                return Ok(Vec::new());
            }
        }
        let before = self.world.take();
        let now = self.unite(before.as_ref());
        for (place, problems) in &now.problems {
            if before.as_ref().is_none_or(|before| before.problems.get(place) != Some(problems)) {
                for problem in problems {
                    warn!("{place}: {problem}");
                }
            }
        }
        let events = match &before {
            None => first(&now, self.pods),
            Some(before) => changes(before, &now),
        };
        self.world = Some(now);
        Ok(events)
    }

    /// What of two looks agrees; the rest as it is known. Names the files of which that has been so for long.
    fn settled(&mut self, before: &Listing, mut now: Listing, at: Instant) -> (Listing, BTreeSet<PathBuf>) {
        let moved = |path: &&PathBuf| before.files.get(*path) != now.files.get(*path);
        let moving: BTreeSet<PathBuf> = before.files.keys().chain(now.files.keys()).filter(moved).cloned().collect();
        self.restless.retain(|path, _| moving.contains(path));
        let mut overdue = BTreeSet::new();
        for path in moving {
            let since = *self.restless.entry(path.clone()).or_insert(at);
            if at.duration_since(since) >= SETTLE_MOST && now.files.contains_key(&path) {
                overdue.insert(path);
            } else if !self.files.contains_key(&path) {
                now.files.remove(&path);
            } else if let Some(signature) = before.files.get(&path) {
                now.files.entry(path).or_insert(*signature);
            }
        }
        (now, overdue)
    }

    fn differs(&self, listing: &Listing) -> bool {
        let Listing { files, unreadable } = listing;
        *unreadable != self.unreadable
            || files.iter().any(|(path, signature)| self.files.get(path).is_none_or(|known| known.is_news(*signature)))
            || self.files.keys().any(|path| !files.contains_key(path) && !beneath(path, unreadable))
    }

    fn take_in(&mut self, listing: Listing, overdue: &BTreeSet<PathBuf>) {
        let Listing { files, unreadable } = listing;
        self.files.retain(|path, _| files.contains_key(path) || beneath(path, &unreadable));
        self.unreadable = unreadable;
        for (path, signature) in files {
            let is_overdue = overdue.contains(&path);
            if self.restless.contains_key(&path) && !is_overdue {
                continue;
            }
            let file = self.files.entry(path.clone()).or_default();
            if !file.is_news(signature) {
                continue;
            }
            if file.read(&path, signature, is_overdue, &mut self.names) {
                self.restless.remove(&path);
            } else {
                self.restless.entry(path.clone()).or_insert_with(Instant::now);
            }
            for kind in &file.good.ignored {
                if self.noticed.insert(kind.clone()) {
                    info!(%kind, file = %path.display(), "objects of this kind mean nothing to the proxy and are ignored");
                }
            }
        }
    }

    /// What there is no last good state of, why, and what to do.
    fn never_read(&self) -> Vec<String> {
        const REMEDY: &str = "mend it or take it away";
        let unreadable = self
            .unreadable
            .iter()
            .map(|(path, why)| format!("{} (cannot be read: {why}; {REMEDY})", self.place(path, 0)));
        let broken = self.files.iter().filter(|(_, file)| !file.parsed).filter_map(|(path, file)| {
            let (line, why) = file.broken.as_ref()?;
            Some(format!("{} ({why}; {REMEDY})", self.place(path, *line)))
        });
        unreadable.chain(broken).collect()
    }

    fn unite(&self, before: Option<&World>) -> World {
        let mut world =
            World { node: NodeFacts { name: Arc::clone(&self.node), ..NodeFacts::default() }, ..World::default() };
        let mut say = |place: String, problem: String| world.problems.entry(place).or_default().push(problem);
        for (path, why) in &self.unreadable {
            say(self.place(path, 0), format!("{why}; what it held before stands until it can be read"));
        }
        let (mut services, mut slices) = (Owners::default(), Owners::default());
        let (mut pods, mut namespaces) = (Owners::default(), Owners::default());
        let mut node: Option<String> = None;
        for (path, file) in &self.files {
            let File { signature: _, again: _, good, parsed: _, broken } = file;
            if let Some((line, why)) = broken {
                say(self.place(path, *line), format!("{why}; what the file held before stands until that is mended"));
            }
            for (line, problem) in &good.problems {
                say(self.place(path, *line), problem.clone());
            }
            for (line, service) in &good.services {
                let place = self.place(path, *line);
                if let Some(other) = services.claim(service.key.clone(), Arc::clone(service), &place) {
                    say(place, format!("Service {} is in {other} already, which stands; take one away", service.key));
                }
            }
            for (line, slice) in &good.slices {
                let place = self.place(path, *line);
                let key = (Arc::clone(&slice.namespace), Arc::clone(&slice.name));
                if let Some(other) = slices.claim(key, Arc::clone(slice), &place) {
                    let name = format!("EndpointSlice {}/{}", slice.namespace, slice.name);
                    say(place, format!("{name} is in {other} already, which stands; take one away"));
                }
            }
            let of_node = good.pods.iter().filter(|(_, node, _)| self.pods && *node == self.node);
            for (line, _, pod) in of_node {
                let place = self.place(path, *line);
                if let Some(other) = pods.claim(pod.key.clone(), Arc::clone(pod), &place) {
                    let (namespace, name) = &pod.key;
                    say(place, format!("Pod {namespace}/{name} is in {other} already, which stands; take one away"));
                }
            }
            for (line, name, value) in good.namespaces.iter().filter(|_| self.pods) {
                let place = self.place(path, *line);
                if let Some(other) = namespaces.claim(Arc::clone(name), value.clone(), &place) {
                    say(place, format!("Namespace {name} is in {other} already, which stands; take one away"));
                }
            }
            for (line, facts) in good.nodes.iter().filter(|(_, facts)| facts.name == self.node) {
                let place = self.place(path, *line);
                match &node {
                    Some(other) => {
                        say(place, format!("Node {} is in {other} already, which stands; take one away", facts.name));
                    }
                    None => {
                        world.node = facts.clone();
                        node = Some(place);
                    }
                }
            }
        }
        // What cannot be read stands as it was, unless another file has it.
        for (path, file) in &self.files {
            for (line, object, why) in &file.good.unreadable {
                let place = self.place(path, *line);
                let stands = match object {
                    Object::Service(key) => match before.and_then(|before| before.services.get(key)) {
                        Some(known) => services.claim(key.clone(), Arc::clone(known), &place).is_none(),
                        None if services.has(key) => false,
                        None => {
                            world.unknown_services.insert(key.clone());
                            true
                        }
                    },
                    Object::Slice(key, service) => match before.and_then(|before| before.slices.get(key)) {
                        Some(known) => slices.claim(key.clone(), Arc::clone(known), &place).is_none(),
                        None if slices.has(key) => false,
                        None => {
                            world.unknown_slices.insert(key.clone(), service.clone());
                            true
                        }
                    },
                    Object::Node(name) if *name == self.node && node.is_none() => {
                        if let Some(before) = before {
                            world.node = before.node.clone();
                        }
                        true
                    }
                    Object::Node(_) => false,
                    Object::Pod(_) | Object::Namespace(_) if !self.pods => continue,
                    Object::Pod(key) => before
                        .and_then(|before| before.pods.get(key))
                        .is_some_and(|known| pods.claim(key.clone(), Arc::clone(known), &place).is_none()),
                    Object::Namespace(name) => {
                        before.and_then(|before| before.namespaces.get(name)).is_some_and(|known| {
                            namespaces.claim(Arc::clone(name), Some(Arc::clone(known)), &place).is_none()
                        })
                    }
                };
                let outcome = if stands { "what was known of it before stands" } else { "it is left out" };
                say(place, format!("{object} {why}; {outcome} until it is mended"));
            }
        }
        world.services = services.objects();
        world.slices = slices.objects();
        world.pods = pods.objects();
        world.namespaces = namespaces.objects().into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        world
    }

    /// `path:line` below the root.
    fn place(&self, path: &Path, line: Line) -> String {
        let path = path.strip_prefix(&self.root).unwrap_or(path).display();
        if line == 0 { path.to_string() } else { format!("{path}:{line}") }
    }
}

fn beneath(path: &Path, places: &BTreeMap<PathBuf, String>) -> bool {
    path.ancestors().any(|ancestor| places.contains_key(ancestor))
}

impl File {
    fn is_news(&self, signature: Signature) -> bool {
        self.again || self.signature != Some(signature)
    }

    /// Reads the file anew; what is there stays where that fails. `false`: it was caught being written. `overdue`: it always is.
    fn read(&mut self, path: &Path, signature: Signature, overdue: bool, names: &mut Names) -> bool {
        let read = std::fs::read(path);
        // Of a file that changed since it was looked at nobody knows what was read.
        if files::signature(path).is_ok_and(|now| now != signature) {
            if !self.parsed {
                self.broken = Some((0, "is being written".to_owned()));
            }
            return false;
        }
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) => {
                self.signature = Some(signature);
                self.again = true;
                self.broken = Some((0, format!("cannot be read: {error}")));
                return true;
            }
        };
        let text = String::from_utf8(bytes).map_err(|error| {
            let good = error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default();
            (1 + good.iter().filter(|byte| **byte == b'\n').count() as Line, "is not UTF-8 text".to_owned())
        });
        let parsed = text.and_then(|text| {
            parse::parse(path, &text, names)
                .map_err(|broken| (broken.line, format!("does not parse: {}", broken.message)))
        });
        match parsed {
            Ok(parsed) if overdue && parsed.holds_less_than(&self.good) => return false,
            Ok(parsed) => {
                *self = Self { signature: Some(signature), again: false, good: parsed, parsed: true, broken: None };
            }
            Err(_) if overdue && self.parsed => return false,
            Err(why) => {
                self.signature = Some(signature);
                self.again = false;
                self.broken = Some(why);
            }
        }
        true
    }
}

/// Objects by key, and where each is from.
struct Owners<K, T>(BTreeMap<K, (String, T)>);

impl<K, T> Default for Owners<K, T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord, T> Owners<K, T> {
    /// Takes the object in, or tells who has one of this key.
    fn claim(&mut self, key: K, object: T, place: &str) -> Option<&str> {
        match self.0.entry(key) {
            Entry::Vacant(vacant) => {
                vacant.insert((place.to_owned(), object));
                None
            }
            Entry::Occupied(occupied) => Some(&occupied.into_mut().0),
        }
    }

    fn has(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    fn objects(self) -> BTreeMap<K, T> {
        self.0.into_iter().map(|(key, (_, object))| (key, object)).collect()
    }
}

/// `with_pods`: they are told, and if there are none.
fn first(now: &World, with_pods: bool) -> Vec<Event> {
    let World { services, slices, node, pods: _, namespaces: _, unknown_services, unknown_slices, problems } = now;
    let mut events = vec![Event::Node(node.clone())];
    if with_pods {
        events.push(pods(now));
        events.push(namespaces(now));
    }
    if !unknown_slices.is_empty() {
        events.push(Event::UnreadableSlices(unknown_slices.clone()));
    }
    events.push(Event::Slices(slices.values().cloned().collect()));
    if !unknown_services.is_empty() {
        events.push(Event::UnreadableServices(unknown_services.clone()));
    }
    events.push(Event::Services(services.values().cloned().collect()));
    if !problems.is_empty() {
        events.push(Event::Problems(Teller::Source, problems.clone()));
    }
    events
}

fn pods(now: &World) -> Event {
    Event::Pods { list: now.pods.values().cloned().collect(), unreadable: BTreeSet::new() }
}

fn namespaces(now: &World) -> Event {
    Event::Namespaces { list: now.namespaces.clone(), unreadable: BTreeSet::new() }
}

/// Endpoints come before the Services that want them and go after them: no moment in between has a Service without its
/// endpoints.
fn changes(before: &World, now: &World) -> Vec<Event> {
    let mut events = Vec::new();
    if before.node != now.node {
        events.push(Event::Node(now.node.clone()));
    }
    if before.pods != now.pods {
        events.push(pods(now));
    }
    if before.namespaces != now.namespaces {
        events.push(namespaces(now));
    }
    let changed = now.slices.iter().filter(|(key, slice)| before.slices.get(key) != Some(slice));
    events.extend(changed.map(|(_, slice)| Event::Slice(Arc::clone(slice))));
    let changed = now.services.iter().filter(|(key, service)| before.services.get(key) != Some(service));
    events.extend(changed.map(|(_, service)| Event::Service(Arc::clone(service))));
    let gone = before.services.keys().chain(&before.unknown_services);
    let gone = gone.filter(|key| !now.services.contains_key(key) && !now.unknown_services.contains(*key));
    events.extend(gone.map(|key| Event::ServiceGone(key.clone())));
    let gone = before.slices.keys().chain(before.unknown_slices.keys());
    let gone = gone.filter(|key| !now.slices.contains_key(key) && !now.unknown_slices.contains_key(*key));
    events.extend(
        gone.map(|(namespace, name)| Event::SliceGone { namespace: Arc::clone(namespace), name: Arc::clone(name) }),
    );
    if before.problems != now.problems {
        events.push(Event::Problems(Teller::Source, now.problems.clone()));
    }
    events
}

#[cfg(test)]
mod tests;
