use std::{fs, os::unix::fs::symlink};

use super::*;

fn service(name: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )
}

fn slice(name: &str, service: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, labels: {{kubernetes.io/service-name: \
         {service}}}}}\naddressType: IPv4\nendpoints: [{{addresses: [{ip}]}}]\nports: [{{port: 8080}}]\n"
    )
}

/// One word for each event: enough to tell them apart.
fn words(events: &[Event]) -> Vec<String> {
    let name = |service: &Service| format!("{}@{}", service.key.name, service.cluster_ips[0]);
    events
        .iter()
        .map(|event| match event {
            Event::Service(service) => format!("service {}", name(service)),
            Event::ServiceGone(key) => format!("service-gone {}", key.name),
            Event::Slice(slice) => format!("slice {}@{}", slice.name, slice.endpoints[0].address),
            Event::SliceGone { name, .. } => format!("slice-gone {name}"),
            Event::Node(facts) => format!("node {} {:?}", facts.name, facts.zone),
            Event::Services(list) => format!("services {}", list.iter().map(|s| name(s)).collect::<Vec<_>>().join(" ")),
            Event::Slices(list) => {
                format!("slices {}", list.iter().map(|s| s.name.to_string()).collect::<Vec<_>>().join(" "))
            }
            Event::UnreadableServices(keys) => {
                format!("unreadable {}", keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
            }
            Event::UnreadableSlices(keys) => format!("unreadable slices {keys:?}"),
            Event::Pods { list, .. } => {
                format!("pods {}", list.iter().map(|pod| &*pod.key.1).collect::<Vec<_>>().join(" "))
            }
            Event::Namespaces { list, .. } => format!("namespaces {list:?}"),
            Event::Pod(_) | Event::PodGone(_) | Event::Namespace(..) => unreachable!("files tell all of them"),
            Event::Addresses(_) => unreachable!("files know no addresses"),
            Event::Problems(_, problems) => {
                format!("problems {}", problems.keys().cloned().collect::<Vec<_>>().join(" "))
            }
        })
        .collect()
}

/// ext4 has whoever truncates a file and writes it again wait for the disk, which may take seconds while others write.
fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

struct Tree {
    root: tempfile::TempDir,
    directory: Directory,
}

impl Tree {
    fn new(files: &[(&str, &str)]) -> Self {
        let root = in_memory();
        for (name, text) in files {
            fs::write(root.path().join(name), text).unwrap();
        }
        let directory = Directory::new(root.path(), "n1");
        Self { root, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn look(&mut self) -> Vec<String> {
        words(&self.directory.look().unwrap())
    }

    fn problems(&self) -> String {
        let world = self.directory.world.as_ref().unwrap();
        world
            .problems
            .iter()
            .flat_map(|(place, said)| said.iter().map(move |said| format!("{place}: {said}\n")))
            .collect()
    }
}

#[test]
fn first_look_then_differences() {
    let mut tree = Tree::new(&[("a.yaml", &(service("a", "10.0.0.1") + &slice("a-1", "a", "10.1.0.1")))]);
    assert_eq!(tree.look(), ["node n1 None", "slices a-1", "services a@10.0.0.1"]);
    assert_eq!(tree.look(), Vec::<String>::new());

    fs::create_dir(tree.path("more")).unwrap();
    fs::write(tree.path("more/b.yml"), service("b", "10.0.0.2") + &slice("b-1", "b", "10.1.0.2")).unwrap();
    fs::write(
        tree.path("n.yaml"),
        "{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/zone: z}}}",
    )
    .unwrap();
    assert_eq!(tree.look(), ["node n1 Some(\"z\")", "slice b-1@10.1.0.2", "service b@10.0.0.2"]);

    // Written anew with the same contents: nothing changed.
    fs::write(tree.path("more/b.yml"), service("b", "10.0.0.2") + &slice("b-1", "b", "10.1.0.2")).unwrap();
    assert_eq!(tree.look(), Vec::<String>::new());

    // A slice of another name takes over (F10): the new one first.
    fs::write(tree.path("more/b.yml"), service("b", "10.0.0.2") + &slice("b-2", "b", "10.1.0.3")).unwrap();
    assert_eq!(tree.look(), ["slice b-2@10.1.0.3", "slice-gone b-1"]);

    fs::remove_dir_all(tree.path("more")).unwrap();
    fs::remove_file(tree.path("n.yaml")).unwrap();
    assert_eq!(tree.look(), ["node n1 None", "service-gone b", "slice-gone b-2"]);
}

#[test]
fn a_broken_file_keeps_its_last_good_state() {
    let mut tree = Tree::new(&[("a.yaml", &service("a", "10.0.0.1")), ("b.yaml", &service("b", "10.0.0.2"))]);
    tree.look();
    fs::write(tree.path("a.yaml"), "kind: [Service\nmetadata: x\n").unwrap();
    fs::write(tree.path("b.yaml"), service("b", "10.0.0.3")).unwrap();
    let words = tree.look();
    assert_eq!(words[0], "service b@10.0.0.3");
    assert!(words[1].starts_with("problems a.yaml:"), "{words:?}");
    let problems = tree.problems();
    assert!(
        problems.starts_with("a.yaml:2: does not parse") || problems.starts_with("a.yaml:1: does not parse"),
        "{problems}"
    );
    assert!(problems.trim_end().ends_with("; what the file held before stands until that is mended"), "{problems}");

    // Not text at all, then gone for good.
    fs::write(tree.path("a.yaml"), b"a: 1\nb: \xff\n").unwrap();
    assert_eq!(tree.look(), ["problems a.yaml:2"]);
    fs::remove_file(tree.path("a.yaml")).unwrap();
    assert_eq!(tree.look(), ["service-gone a", "problems "]);
}

/// An earlier run's frontends go on serving until all is known.
#[test]
fn a_file_that_never_parsed_is_waited_for() {
    let broken = "kind: Service\nmetadata: [x\nspec: y\n";
    let mut tree = Tree::new(&[("a.yaml", &service("a", "10.0.0.1")), ("web.yaml", broken)]);
    assert_eq!(tree.look(), Vec::<String>::new());
    let missing = tree.directory.missing.concat();
    assert!(missing.starts_with("web.yaml:") && missing.contains("does not parse"), "{missing}");
    assert!(missing.ends_with("; mend it or take it away)"), "{missing}");
    // Another file that breaks meanwhile has a last good state.
    fs::write(tree.path("a.yaml"), broken).unwrap();
    assert_eq!(tree.look(), Vec::<String>::new());
    assert_eq!(tree.directory.missing.len(), 1);
    fs::write(tree.path("web.yaml"), service("web", "10.0.0.2")).unwrap();
    assert_eq!(tree.look()[..3], ["node n1 None", "slices ", "services a@10.0.0.1 web@10.0.0.2"]);

    let mut tree = Tree::new(&[("a.yaml", &service("a", "10.0.0.1")), ("web.yaml", broken)]);
    symlink("loop.yaml", tree.path("loop.yaml")).unwrap();
    assert_eq!(tree.look(), Vec::<String>::new());
    assert!(tree.directory.missing[0].starts_with("loop.yaml (cannot be read: "), "{:?}", tree.directory.missing);
    fs::remove_file(tree.path("web.yaml")).unwrap();
    assert_eq!(tree.look(), Vec::<String>::new());
    fs::remove_file(tree.path("loop.yaml")).unwrap();
    assert_eq!(tree.look(), ["node n1 None", "slices ", "services a@10.0.0.1"]);
    // From now on a broken file holds nothing up.
    fs::write(tree.path("new.yaml"), broken).unwrap();
    fs::write(tree.path("b.yaml"), service("b", "10.0.0.2")).unwrap();
    assert_eq!(tree.look()[0], "service b@10.0.0.2");
}

#[tokio::test(flavor = "multi_thread")]
async fn not_synced_before_every_file_parsed() {
    let root = in_memory();
    let file = root.path().join("web.yaml");
    fs::write(&file, "kind: [").unwrap();
    let (tx, mut events) = mpsc::channel(8);
    let (state, mut states) = watch::channel(SourceState::Listing { missing: Vec::new() });
    let cancel = CancellationToken::new();
    let task = tokio::spawn({
        let (root, cancel) = (root.path().to_path_buf(), cancel.clone());
        async move { run("n1", false, &root, &tx, &state, &cancel).await }
    });
    let second = Duration::from_secs(2);
    let waits = |state: &SourceState| matches!(state, SourceState::Listing { missing } if !missing.is_empty());
    drop(tokio::time::timeout(second, states.wait_for(waits)).await.unwrap().unwrap());
    tokio::time::sleep(LOOK * 2).await;
    assert!(waits(&states.borrow()) && events.try_recv().is_err());
    fs::write(&file, service("web", "10.0.0.2")).unwrap();
    drop(tokio::time::timeout(second, states.wait_for(|state| *state == SourceState::Synced)).await.unwrap().unwrap());
    let mut said = Vec::new();
    until(&mut events, &mut said, |said| said.iter().any(|word| word == "services web@10.0.0.2")).await;
    cancel.cancel();
    tokio::time::timeout(second, task).await.unwrap().unwrap().unwrap();
}

#[test]
fn a_bad_object_is_left_out_alone() {
    let bad = "---\napiVersion: v1\nkind: Service\nmetadata: {namespace: x}\nspec: {clusterIP: 10.0.0.9}\n";
    let mut tree = Tree::new(&[("a.yaml", &(service("a", "10.0.0.1") + bad + &service("b", "10.0.0.2")))]);
    assert_eq!(tree.look(), ["node n1 None", "slices ", "services a@10.0.0.1 b@10.0.0.2", "problems a.yaml:7"]);
    assert_eq!(tree.problems(), "a.yaml:7: Service: metadata.name is missing; the object is left out, give it one\n");
}

#[test]
fn the_same_object_twice() {
    let mut tree = Tree::new(&[
        ("b.yaml", &service("a", "10.0.0.2")),
        ("c.yaml", &(slice("s", "a", "10.1.0.1") + &slice("s", "a", "10.1.0.2"))),
    ]);
    assert_eq!(tree.look(), ["node n1 None", "slices s", "services a@10.0.0.2", "problems c.yaml:9"]);
    assert!(tree.problems().contains("EndpointSlice default/s is in c.yaml:2 already"), "{}", tree.problems());
    // First in path order wins, though it came later; and hands over when it goes.
    fs::write(tree.path("a.yaml"), service("a", "10.0.0.1")).unwrap();
    assert_eq!(tree.look(), ["service a@10.0.0.1", "problems b.yaml:2 c.yaml:9"]);
    assert!(
        tree.problems().contains("b.yaml:2: Service default/a is in a.yaml:2 already, which stands; take one away"),
        "{}",
        tree.problems()
    );
    fs::remove_file(tree.path("a.yaml")).unwrap();
    assert_eq!(tree.look(), ["service a@10.0.0.2", "problems c.yaml:9"]);
}

/// A6: changes of type make a Service come and go.
#[test]
fn a_service_that_stops_being_ours() {
    let mut tree = Tree::new(&[("a.yaml", &service("a", "10.0.0.1"))]);
    tree.look();
    for spec in ["{type: ExternalName, clusterIP: 10.0.0.1}", "{clusterIP: None}"] {
        fs::write(tree.path("a.yaml"), format!("apiVersion: v1\nkind: Service\nmetadata: {{name: a}}\nspec: {spec}\n"))
            .unwrap();
        assert_eq!(tree.look(), ["service-gone a"], "{spec}");
        fs::write(tree.path("a.yaml"), service("a", "10.0.0.1")).unwrap();
        assert_eq!(tree.look(), ["service a@10.0.0.1"], "{spec}");
    }
}

#[test]
fn only_the_own_node_counts() {
    let mut tree = Tree::new(&[(
        "a.yaml",
        "{apiVersion: v1, kind: Node, metadata: {name: n2, labels: {topology.kubernetes.io/zone: z2}}}\n---\n{apiVersion: v1, kind: Node, \
         metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}}}\n",
    )]);
    assert_eq!(tree.look()[0], "node n1 Some(\"z1\")");
}

#[test]
fn a_directory_that_vanishes_takes_nothing_along() {
    let mut tree = Tree::new(&[("a.yaml", &service("a", "10.0.0.1"))]);
    tree.look();
    let aside = tree.root.path().with_extension("aside");
    fs::rename(tree.root.path(), &aside).unwrap();
    assert!(tree.directory.look().is_err());
    fs::rename(&aside, tree.root.path()).unwrap();
    assert_eq!(tree.look(), Vec::<String>::new());
}

/// Collects what `run` says until `done`, or fails after two seconds.
async fn until(
    events: &mut mpsc::Receiver<Event>,
    said: &mut Vec<String>,
    done: impl Fn(&[String]) -> bool,
) -> Duration {
    let began = Instant::now();
    while !done(said) {
        match tokio::time::timeout(Duration::from_secs(2), events.recv()).await {
            Ok(Some(event)) => said.extend(words(&[event])),
            outcome => panic!("{outcome:?} after {said:?}"),
        }
    }
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_arrive_within_a_second() {
    let root = in_memory();
    let path = |name: &str| root.path().join(name);
    fs::write(path("a.yaml"), service("a", "10.0.0.1")).unwrap();
    // A ConfigMap as kubelet mounts it.
    fs::create_dir(path("..1")).unwrap();
    fs::write(path("..1/b.yaml"), service("b", "10.0.0.2")).unwrap();
    symlink("..1", path("..data")).unwrap();
    symlink("..data/b.yaml", path("b.yaml")).unwrap();

    let (tx, mut events) = mpsc::channel(1);
    let (state, mut states) = watch::channel(SourceState::Listing { missing: vec!["everything".into()] });
    let cancel = CancellationToken::new();
    let task = tokio::spawn({
        let (root, cancel) = (root.path().to_path_buf(), cancel.clone());
        async move { run("n1", false, &root, &tx, &state, &cancel).await }
    });
    let mut said = Vec::new();
    until(&mut events, &mut said, |said| said.last().is_some_and(|last| last == "services a@10.0.0.1 b@10.0.0.2"))
        .await;
    tokio::time::timeout(Duration::from_secs(1), states.wait_for(|state| *state == SourceState::Synced))
        .await
        .unwrap()
        .unwrap();

    // An editor that writes beside and renames.
    fs::write(path("a.yaml.new"), service("a", "10.0.0.3")).unwrap();
    fs::rename(path("a.yaml.new"), path("a.yaml")).unwrap();
    let took = until(&mut events, &mut said, |said| said.last().is_some_and(|last| last == "service a@10.0.0.3")).await;
    assert!(took < Duration::from_secs(1), "{took:?}");

    // kubelet updates the ConfigMap.
    fs::create_dir(path("..2")).unwrap();
    fs::write(path("..2/b.yaml"), service("b", "10.0.0.4")).unwrap();
    symlink("..2", path("..data_tmp")).unwrap();
    fs::rename(path("..data_tmp"), path("..data")).unwrap();
    let took = until(&mut events, &mut said, |said| said.last().is_some_and(|last| last == "service b@10.0.0.4")).await;
    assert!(took < Duration::from_secs(1), "{took:?}");

    // An editor that truncates first must not take the Service away meanwhile.
    let file = fs::File::create(path("a.yaml")).unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    fs::write(path("a.yaml"), service("a", "10.0.0.5")).unwrap();
    drop(file);
    until(&mut events, &mut said, |said| said.last().is_some_and(|last| last == "service a@10.0.0.5")).await;
    assert!(!said.iter().any(|word| word.starts_with("service-gone")), "{said:?}");

    cancel.cancel();
    tokio::time::timeout(Duration::from_secs(2), task).await.unwrap().unwrap().unwrap();
}

/// A file that is written while it is looked at is there, whatever could be read of it.
#[test]
fn a_file_that_could_not_be_read_is_not_gone_while_it_is_written() {
    let mut tree = Tree::new(&[("a.yaml", &service("a", "10.0.0.1")), ("b.yaml", &service("b", "10.0.0.2"))]);
    tree.look();
    // A file that not even root can read from its start.
    fs::remove_file(tree.path("a.yaml")).unwrap();
    symlink("/proc/self/mem", tree.path("a.yaml")).unwrap();
    assert_eq!(tree.look(), ["problems a.yaml"]);
    let before = files::list(tree.root.path()).unwrap();
    fs::remove_file(tree.path("a.yaml")).unwrap();
    fs::write(tree.path("a.yaml"), "").unwrap();
    let now = files::list(tree.root.path()).unwrap();
    let (settled, overdue) = tree.directory.settled(&before, now, Instant::now());
    assert!(overdue.is_empty());
    tree.directory.take_in(settled, &overdue);
    assert_eq!(tree.directory.files.len(), 2);
    let good = &tree.directory.files[&tree.path("a.yaml")].good;
    assert_eq!(good.services.len(), 1, "restless, so not read");
    fs::write(tree.path("a.yaml"), service("a", "10.0.0.3")).unwrap();
    assert_eq!(tree.look(), ["service a@10.0.0.3", "problems "]);
}

/// Whoever rewrites a file in place, and often, may be met between truncating and writing at every look.
#[test]
fn a_file_rewritten_in_place_loses_nothing() {
    let text = |round: u32| {
        service("a", &format!("10.1.0.{}", 1 + round % 200))
            + &slice("a-1", "a", "10.2.0.1")
            + &service("b", "10.0.0.2")
    };
    let write = |path: &Path, stop: &std::sync::atomic::AtomicBool| {
        let mut longest = Duration::ZERO;
        for round in 1_u32.. {
            if stop.load(std::sync::atomic::Ordering::Relaxed) {
                break;
            }
            let began = Instant::now();
            fs::write(path, "").unwrap();
            std::thread::sleep(Duration::from_millis(20));
            // A half, then all of it.
            fs::write(path, text(round).split_inclusive("---").take(2).collect::<String>()).unwrap();
            std::thread::sleep(Duration::from_millis(10));
            fs::write(path, text(round)).unwrap();
            longest = longest.max(began.elapsed());
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::write(path, text(7)).unwrap();
        longest
    };
    let mut tree = Tree::new(&[("a.yaml", &text(0))]);
    tree.look();
    // A writer whom a busy machine keeps from going on leaves a file that is empty and at rest.
    for tries in 1.. {
        let stop = std::sync::atomic::AtomicBool::new(false);
        let path = tree.path("a.yaml");
        let mut said = Vec::new();
        let longest = std::thread::scope(|scope| {
            let writer = scope.spawn(|| write(&path, &stop));
            let began = Instant::now();
            while began.elapsed() < SETTLE_MOST * 5 {
                said.extend(tree.look());
                std::thread::sleep(Duration::from_millis(7));
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            writer.join().unwrap()
        });
        said.extend(tree.look());
        if longest < SETTLE {
            assert!(!said.iter().any(|word| word.contains("gone")), "{said:?}");
            assert!(said.last().is_some_and(|word| word == "service a@10.1.0.8"), "{said:?}");
            break;
        }
        assert!(tries < 20, "the file was never written in time, but in {longest:?}");
    }
    // At rest, less is less.
    fs::write(tree.path("a.yaml"), service("b", "10.0.0.2")).unwrap();
    assert_eq!(tree.look(), ["service-gone a", "slice-gone a-1"]);
}

/// F17: an object that cannot be read costs itself alone, and keeps its last good state.
#[test]
fn an_unreadable_object_stands_as_it_was() {
    let bad = "---\napiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: 5\n";
    let bad_slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a-1, labels: \
                     {kubernetes.io/service-name: a}}\nendpoints: 5\n";
    let good = service("a", "10.0.0.1") + &slice("a-1", "a", "10.1.0.1");
    let mut tree = Tree::new(&[("a.yaml", &(good.clone() + &service("b", "10.0.0.2")))]);
    tree.look();
    fs::write(tree.path("a.yaml"), bad.to_owned() + bad_slice + &service("b", "10.0.0.3")).unwrap();
    assert_eq!(tree.look(), ["service b@10.0.0.3", "problems a.yaml:2 a.yaml:7"]);
    assert!(tree.problems().contains("Service default/a cannot be read: "), "{}", tree.problems());
    assert!(tree.problems().contains("; what was known of it before stands until it is mended"), "{}", tree.problems());
    // In another file, too; and still so when something else changes.
    fs::write(tree.path("a.yaml"), service("b", "10.0.0.4")).unwrap();
    fs::write(tree.path("z.yaml"), bad.to_owned() + bad_slice).unwrap();
    assert_eq!(tree.look(), ["service b@10.0.0.4", "problems z.yaml:2 z.yaml:7"]);
    fs::remove_file(tree.path("z.yaml")).unwrap();
    assert_eq!(tree.look(), ["service-gone a", "slice-gone a-1", "problems "]);

    // Nothing known of it: an earlier run may have left something in force.
    let mut tree = Tree::new(&[("a.yaml", &(bad.to_owned() + bad_slice + &service("b", "10.0.0.2")))]);
    let said = tree.look();
    assert_eq!(said[2..4], ["slices ", "unreadable default/a"], "{said:?}");
    assert!(said[1].starts_with("unreadable slices") && said[1].contains("a-1"), "{said:?}");
    fs::remove_file(tree.path("a.yaml")).unwrap();
    assert_eq!(tree.look(), ["service-gone b", "service-gone a", "slice-gone a-1", "problems "]);
}

/// A file that is written all the time delays itself alone, and that not for ever.
#[test]
fn a_restless_file_holds_up_no_other() {
    let mut tree =
        Tree::new(&[("noisy.yaml", &service("noisy", "10.0.0.1")), ("quiet.yaml", &service("quiet", "10.0.0.2"))]);
    tree.look();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (stop, path) = (Arc::clone(&stop), tree.path("noisy.yaml"));
        move || {
            for round in 0_u32.. {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                // Beside and renamed: whatever look catches it, it is whole.
                let text = format!(
                    "{}# {}\n",
                    service("noisy", &format!("10.1.0.{}", 1 + round % 200)),
                    "x".repeat(round as usize % 50)
                );
                fs::write(path.with_extension("new"), text).unwrap();
                fs::rename(path.with_extension("new"), &path).unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    fs::write(tree.path("quiet.yaml"), service("quiet", "10.0.0.3")).unwrap();
    let began = Instant::now();
    let mut said = Vec::new();
    while !said.iter().any(|word| word == "service quiet@10.0.0.3") {
        said.extend(tree.look());
        assert!(began.elapsed() < Duration::from_secs(5), "{said:?}");
    }
    let took = began.elapsed();
    assert!(took < SETTLE_MOST, "the quiet file waited {took:?}");
    assert_eq!(said, ["service quiet@10.0.0.3"], "the noisy one had not settled yet");
    assert!(tree.directory.walked < SETTLE, "waiting is no work: {:?}", tree.directory.walked);
    while !said.iter().any(|word| word.starts_with("service noisy")) {
        said.extend(tree.look());
        assert!(began.elapsed() < Duration::from_secs(5), "{said:?}");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_such_directory() {
    let (tx, _events) = mpsc::channel(1);
    let (state, _states) = watch::channel(SourceState::Synced);
    let error =
        run("n1", false, Path::new("/nonexistent/dir"), &tx, &state, &CancellationToken::new()).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/dir"), "{error}");
}

/// Whatever is read again and however often it is there.
#[test]
fn a_kind_that_means_nothing_is_said_once() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        let map = |name: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\n---\n");
        let mut tree = Tree::new(&[("a.yaml", &(map("a") + &map("b"))), ("b.yaml", &map("c"))]);
        for round in 0..3 {
            fs::write(tree.path("a.yaml"), map("a") + &service(&format!("s{round}"), "10.0.0.1")).unwrap();
            fs::write(tree.path(&format!("c{round}.yaml")), map("d")).unwrap();
            assert!(!tree.look().is_empty());
            assert_eq!(log.ignored(), ["v1 ConfigMap"]);
        }
        tree.look();
        assert_eq!(log.ignored(), ["v1 ConfigMap"]);
        // Another kind is another notice, wherever it comes up, and the first one is not repeated for it.
        fs::write(tree.path("a.yaml"), map("a") + "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n")
            .unwrap();
        tree.look();
        assert_eq!(log.ignored(), ["v1 ConfigMap", "apps/v1 Deployment"]);
        // Nor is one that was gone for a while news.
        fs::remove_file(tree.path("a.yaml")).unwrap();
        tree.look();
        fs::write(tree.path("z.yaml"), "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: e}\n").unwrap();
        tree.look();
        assert_eq!(log.ignored(), ["v1 ConfigMap", "apps/v1 Deployment"]);
    });
}

#[derive(Clone, Default)]
struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl Log {
    /// The kinds that were said to be ignored, one for each time.
    fn ignored(&self) -> Vec<String> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let notices = log.lines().filter(|line| line.contains("are ignored"));
        notices.map(|line| line.split("kind=").nth(1).unwrap().split(" file=").next().unwrap().to_owned()).collect()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
