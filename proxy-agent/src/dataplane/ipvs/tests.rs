//! What becomes of servers, addresses and the table when the kernel or nft refuses, by ones that do as they are told.

use std::{
    fs,
    path::PathBuf,
    sync::{Mutex, MutexGuard},
};

use codec::{Destination, Held, Service};
use ipnet::IpNet;

use super::*;
use crate::{
    dataplane::{
        netfilter::refused,
        nftables::tests::{fake, list_fake},
    },
    desired::{Action, Backend, BackendSet, Verdict, Verdicts},
    model::Protocol,
};

/// A virtual server and its destinations.
type Served = (Service, BTreeMap<servers::Place, Held>);

#[derive(Debug, Default)]
struct State {
    device: Option<Device>,
    bound: BTreeSet<IpAddr>,
    routed: BTreeSet<IpAddr>,
    others: Vec<IpNet>,
    neighbours: BTreeMap<IpAddr, Vec<u8>>,
    servers: BTreeMap<Virtual, Served>,
    /// Whoever is to be a destination there is refused.
    refuses: Option<IpAddr>,
    /// There is no scheduler.
    refuses_servers: bool,
    settings: &'static str,
    /// What has to be set besides, as it was before.
    further: &'static str,
    /// What somebody else does just before the settings are read.
    meanwhile: Option<fn(&mut State)>,
    /// What was done, behind how often nft has run.
    done: Vec<String>,
}

#[derive(Clone, Debug)]
struct Fake {
    state: Arc<Mutex<State>>,
    dir: PathBuf,
}

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn done(&self, what: String) {
        let runs = fs::read_to_string(self.dir.join("runs")).unwrap_or_default().lines().count();
        self.state().done.push(format!("{runs}: {what}"));
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

fn name(at: &Virtual) -> String {
    match at {
        Virtual::At { addr, port, .. } => format!("{addr}:{port}"),
        Virtual::Marked { .. } => "mark".into(),
    }
}

impl System for Fake {
    fn device(&mut self) -> io::Result<Option<Device>> {
        Ok(self.state().device.clone())
    }

    fn create(&mut self, alias: &str) -> io::Result<Device> {
        let mut state = self.state();
        if state.device.is_some() {
            return Err(errno(libc::EEXIST));
        }
        let device = Device { index: 7, alias: alias.into(), up: true, is_dummy: true };
        state.device = Some(device.clone());
        Ok(device)
    }

    fn label(&mut self, _index: u32, alias: &str) -> io::Result<()> {
        self.state().device.as_mut().unwrap().alias = alias.into();
        Ok(())
    }

    fn raise(&mut self, _index: u32) -> io::Result<()> {
        Ok(())
    }

    fn addresses(&mut self, _index: u32) -> io::Result<BTreeSet<IpAddr>> {
        Ok(self.state().bound.clone())
    }

    fn others(&mut self) -> io::Result<Vec<IpNet>> {
        Ok(self.state().others.clone())
    }

    fn neighbours(&mut self) -> io::Result<BTreeMap<IpAddr, Vec<u8>>> {
        Ok(self.state().neighbours.clone())
    }

    fn add(&mut self, _index: u32, addr: IpAddr) -> io::Result<()> {
        self.done(format!("hold {addr}"));
        self.state().bound.insert(addr);
        Ok(())
    }

    fn take_off(&mut self, _index: u32, addr: IpAddr) -> io::Result<()> {
        self.done(format!("drop {addr}"));
        self.state().bound.remove(&addr);
        Ok(())
    }

    fn routed(&mut self, _index: u32) -> io::Result<BTreeSet<IpAddr>> {
        Ok(self.state().routed.clone())
    }

    fn let_go(&mut self, _index: u32, addr: IpAddr) -> io::Result<()> {
        self.done(format!("let go {addr}"));
        self.state().routed.remove(&addr);
        Ok(())
    }

    fn services(&mut self) -> io::Result<Vec<Service>> {
        Ok(self.state().servers.values().map(|(service, _)| service.clone()).collect())
    }

    fn service(&mut self, at: Virtual) -> io::Result<Option<Service>> {
        Ok(self.state().servers.get(&at).map(|(service, _)| service.clone()))
    }

    fn destinations(&mut self, at: Virtual) -> io::Result<Vec<Held>> {
        Ok(self.state().servers.get(&at).into_iter().flat_map(|(_, held)| held.values().cloned()).collect())
    }

    fn run(&mut self, requests: &[Request]) -> io::Result<Vec<io::Result<()>>> {
        Ok(requests.iter().map(|request| self.run_one(request)).collect())
    }

    fn note(&mut self, before: &str) -> io::Result<String> {
        let mut state = self.state();
        if let Some(meanwhile) = state.meanwhile.take() {
            meanwhile(&mut state);
        }
        let State { settings, further, .. } = *state;
        let known = if sysctl::Settings::is_note(before) { before.to_owned() } else { format!("before: {settings}") };
        Ok(if known.ends_with(further) { known } else { known + further })
    }

    fn set(&mut self) -> Result<u64, sysctl::Unset> {
        self.state().settings = "conntrack=1";
        Ok(0)
    }

    fn wrong(&mut self) -> Vec<&'static str> {
        Vec::new()
    }
}

impl Fake {
    fn run_one(&self, request: &Request) -> io::Result<()> {
        let at = servers::target(request);
        let what = match request {
            Request::Add(_) => "add".to_owned(),
            Request::Set(_) => "set".to_owned(),
            Request::Remove(_) => "remove".to_owned(),
            Request::AddDestination(_, to) | Request::SetDestination(_, to) => format!("{}={}", to.addr, to.weight),
            Request::RemoveDestination(_, to) => format!("{} goes", to.addr),
        };
        self.done(format!("{} {what}", name(&at)));
        let mut state = self.state();
        let refuses = state.refuses;
        match request {
            Request::Add(service) => {
                if state.servers.contains_key(&at) {
                    return Err(errno(libc::EEXIST));
                }
                if state.refuses_servers {
                    return Err(errno(libc::ENOENT));
                }
                state.servers.insert(at, (service.clone(), BTreeMap::new()));
            }
            Request::Set(service) => state.servers.get_mut(&at).ok_or(errno(libc::ESRCH))?.0 = service.clone(),
            Request::Remove(_) => drop(state.servers.remove(&at).ok_or(errno(libc::ESRCH))?),
            Request::AddDestination(_, to) | Request::SetDestination(_, to) => {
                if refuses == Some(to.addr) {
                    return Err(errno(libc::EINVAL));
                }
                let Destination { addr, port, .. } = *to;
                let all = &mut state.servers.get_mut(&at).ok_or(errno(libc::ESRCH))?.1;
                let active = all.get(&(addr, port)).map_or(0, |held| held.active);
                all.insert((addr, port), Held { destination: *to, translated: true, active, inactive: 0 });
            }
            Request::RemoveDestination(_, to) => {
                state.servers.get_mut(&at).ok_or(errno(libc::ESRCH))?.1.remove(&(to.addr, to.port));
            }
        }
        Ok(())
    }
}

struct World {
    dir: tempfile::TempDir,
    kernel: Fake,
    ipvs: Ipvs,
    desired: DesiredState,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = State { settings: "conntrack=0", ..State::default() };
        let kernel = Fake { state: Arc::new(Mutex::new(state)), dir: dir.path().to_owned() };
        let ipvs = Ipvs::over(fake(dir.path(), Role::Gate), Box::new(kernel.clone()), &Options::default());
        let mut world = Self { dir, kernel, ipvs, desired: DesiredState::default() };
        assert!(world.resync().is_clean());
        world
    }

    /// Another agent comes to what this one left.
    fn restart(&mut self) {
        list_fake(self.dir.path(), &self.ipvs.gate);
        let dir = tempfile::tempdir().unwrap();
        for file in ["table", "runs", "fails"] {
            let text = fs::read_to_string(self.dir.path().join(file)).unwrap_or_default();
            fs::write(dir.path().join(file), text).unwrap();
        }
        self.kernel.dir = dir.path().to_owned();
        self.ipvs = Ipvs::over(fake(dir.path(), Role::Gate), Box::new(self.kernel.clone()), &Options::default());
        self.dir = dir;
    }

    fn resync(&mut self) -> Report {
        self.ipvs.resync(&self.desired)
    }

    fn apply(&mut self, to: DesiredState) -> Report {
        let changes = self.desired.diff(&to);
        self.desired = to;
        self.ipvs.apply(&changes)
    }

    fn set(&mut self, frontends: &[(Frontend, Arc<FrontendSpec>)]) -> Report {
        let mut to = self.desired.clone();
        to.frontends.extend(frontends.iter().cloned());
        let cluster_ips = frontends.iter().filter(|(_, spec)| spec.kind == FrontendKind::ClusterIp);
        to.guards.extend(cluster_ips.map(|(frontend, _)| frontend.addr));
        self.apply(to)
    }

    fn remove(&mut self, frontend: &Frontend) -> Report {
        let mut to = self.desired.clone();
        to.frontends.remove(frontend);
        to.guards.remove(&frontend.addr);
        self.apply(to)
    }

    fn fails(&self, what: &str) {
        fs::write(self.dir.path().join("fails"), what).unwrap();
    }

    fn done(&self) -> Vec<String> {
        std::mem::take(&mut self.kernel.state().done)
    }

    fn bound(&self) -> Vec<String> {
        self.kernel.state().bound.iter().map(ToString::to_string).collect()
    }

    /// `server backend=weight …`
    fn servers(&self) -> Vec<String> {
        let state = self.kernel.state();
        let one = |(at, (_, held)): (&Virtual, &Served)| {
            let held = held.values().map(|held| format!(" {}={}", held.destination.addr, held.destination.weight));
            name(at) + &held.collect::<String>()
        };
        state.servers.iter().map(one).collect()
    }

    fn is_guarded(&self, addr: &str) -> bool {
        list_fake(self.dir.path(), &self.ipvs.gate);
        let table: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(self.dir.path().join("table")).unwrap()).unwrap();
        fs::remove_file(self.dir.path().join("table")).unwrap();
        let sets = table["nftables"].as_array().unwrap().iter().map(|object| &object["set"]);
        let guards = sets.filter(|set| set["name"] == "guards").map(|set| set["elem"].to_string());
        guards.collect::<String>().contains(&format!("\"{addr}\""))
    }

    fn talks_to(&self, addr: &str, connections: u32) {
        let addr: IpAddr = addr.parse().unwrap();
        for (_, held) in self.kernel.state().servers.values_mut() {
            held.values_mut().filter(|held| held.destination.addr == addr).for_each(|held| held.active = connections);
        }
    }

    fn look(&mut self) {
        self.ipvs.look_at = Some(Instant::now());
        self.ipvs.tick();
    }
}

fn serving(addr: &str, kind: FrontendKind, lasts: &[u8]) -> (Frontend, Arc<FrontendSpec>) {
    let frontend = refused::frontend(addr);
    let backend = |last: &u8| Backend { addr: [10, 244, 1, *last].into(), port: 8080.try_into().unwrap() };
    let all: BackendSet = lasts.iter().map(backend).collect();
    let verdict =
        Verdict { action: if lasts.is_empty() { Action::Reject } else { Action::PickAll }, masquerade: false };
    let verdicts = Verdicts { pod: verdict, node: verdict, external: verdict };
    (frontend, Arc::new(FrontendSpec { kind, all, verdicts, ..FrontendSpec::clone(&refused::spec(&frontend)) }))
}

fn with(spec: &FrontendSpec, action: Action) -> Arc<FrontendSpec> {
    let verdict = Verdict { action, masquerade: false };
    Arc::new(FrontendSpec { verdicts: Verdicts { pod: verdict, node: verdict, external: verdict }, ..spec.clone() })
}

const CLUSTER_IP: FrontendKind = FrontendKind::ClusterIp;
const LOAD_BALANCER: FrontendKind = FrontendKind::LoadBalancer;

/// As `--init-only` does it, beside whoever is at work: settings and the device, with what was set before on it, and nothing else.
#[test]
fn what_takes_more_rights_can_be_done_before() {
    let state = State { settings: "conntrack=0", ..State::default() };
    let mut kernel = Fake { state: Arc::new(Mutex::new(state)), dir: PathBuf::new() };
    for _ in 0..2 {
        addresses::ready(&mut kernel, &mut None, &mut 0).unwrap();
        let state = kernel.state();
        assert_eq!((state.settings, state.bound.len(), state.servers.len()), ("conntrack=1", 0, 0));
        // The second time it is known by the device alone.
        assert_eq!(state.device.as_ref().unwrap().alias, "before: conntrack=0");
    }
    // An agent that comes later knows by it what to put back.
    let mut alias = None;
    addresses::ready(&mut kernel, &mut alias, &mut 0).unwrap();
    assert_eq!(alias.as_deref(), Some("before: conntrack=0"));
}

/// Before anything of it was taken away.
#[test]
fn what_a_trial_left_goes_and_nobody_elses() {
    let mut kernel = Fake { state: Arc::default(), dir: PathBuf::new() };
    let mut all: Vec<Request> = trial::services(&Options::default()).into_iter().map(Request::Add).collect();
    let theirs = servers::target(&all[1]);
    let Virtual::At { addr, .. } = theirs else { panic!("{theirs:?}") };
    let beside = Virtual::At { addr, port: 80, protocol: Protocol::Tcp };
    let Request::Add(service) = all[0].clone() else { unreachable!() };
    all.push(Request::Add(Service { at: beside, ..service }));
    // Who has somebody to choose was made by somebody else.
    all.push(Request::AddDestination(theirs, Destination { addr: [10, 244, 1, 1].into(), port: 80, weight: 1 }));
    kernel.run(&all).unwrap().into_iter().for_each(|outcome| outcome.unwrap());
    for _ in 0..2 {
        trial::try_servers(&mut kernel, &Options { masquerade_bit: 7, ..Options::default() }).unwrap();
        let there: BTreeSet<Virtual> = kernel.state().servers.keys().copied().collect();
        assert_eq!(there, [theirs, beside].into());
    }
    // What the kernel refuses is said, though it once took it: nothing is there from before.
    kernel.run(&all).unwrap();
    kernel.state().refuses_servers = true;
    let said = trial::try_servers(&mut kernel, &Options::default()).unwrap_err().to_string();
    assert!(said.contains("modprobe ip_vs_rr"), "{said}");
}

/// An agent and `--init-only`, or two of those: whoever comes later would note what the other has set.
#[test]
fn two_at_once_note_what_was_set_before_either() {
    let made = |alias: &str| Some(Device { index: 7, alias: alias.into(), up: true, is_dummy: true });
    let other: fn(&mut State) = |state| {
        state.device = Some(Device { index: 7, alias: "before: conntrack=0".into(), up: true, is_dummy: true });
        state.settings = "conntrack=1";
    };
    // The other one has not made the device yet, or has made it and written nothing on it.
    for device in [None, made("")] {
        let state = State { settings: "conntrack=0", device, meanwhile: Some(other), ..State::default() };
        let mut kernel = Fake { state: Arc::new(Mutex::new(state)), dir: PathBuf::new() };
        let mut alias = None;
        addresses::ready(&mut kernel, &mut alias, &mut 0).unwrap();
        assert_eq!(alias.as_deref(), Some("before: conntrack=0"));
        assert_eq!(kernel.state().device, made("before: conntrack=0"));
    }
    // Somebody took the device away under an agent, and it was made anew by one that cannot know.
    let state = State { settings: "conntrack=1", device: made("before: conntrack=1"), ..State::default() };
    let mut kernel = Fake { state: Arc::new(Mutex::new(state)), dir: PathBuf::new() };
    addresses::ready(&mut kernel, &mut Some("before: conntrack=0".into()), &mut 0).unwrap();
    assert_eq!(kernel.state().device, made("before: conntrack=0"));
    // Somebody else was asked for more, and has set that.
    kernel.state().device = made("before: conntrack=1 arp_ignore=0");
    let mut alias = Some("before: conntrack=0".into());
    addresses::ready(&mut kernel, &mut alias, &mut 0).unwrap();
    assert_eq!(alias.as_deref(), Some("before: conntrack=0 arp_ignore=0"));
    assert_eq!(kernel.state().device, made("before: conntrack=0 arp_ignore=0"));
}

#[test]
fn nobody_is_served_before_the_table_is_there() {
    let mut world = World::new();
    let web = serving("203.0.113.1", LOAD_BALANCER, &[1, 2]);
    assert!(world.set(&[web]).is_clean());
    let done = world.done();
    let at =
        |what: &str| done.iter().position(|done| done.ends_with(what)).unwrap_or_else(|| panic!("{what}: {done:?}"));
    let (added, held, served) = (at(":80 add"), at("hold 203.0.113.1"), at("10.244.1.1=1"));
    assert!(added < held && held < served, "{done:?}");
    let runs = |at: usize| done[at].split(':').next().unwrap().parse::<u32>().unwrap();
    assert!(runs(added) < runs(held), "the table comes before the address: {done:?}");
    assert!(world.is_guarded("203.0.113.1"));
    assert_eq!(world.resync().failed, BTreeMap::new());
    assert_eq!(world.done(), Vec::<String>::new(), "it is as it should be");
}

/// The first endpoint of the node's own comes to what is local's for the outside: who is sent elsewhere from then on finds somebody there, and the
/// outside, which was dropped, nobody else's.
#[test]
fn nobody_is_refused_while_origins_part() {
    let mut world = World::new();
    let (frontend, spec) = serving("203.0.113.1", LOAD_BALANCER, &[1, 2]);
    let of = |local: &[Backend], external| {
        let verdicts = Verdicts { external: Verdict { action: external, masquerade: false }, ..spec.verdicts };
        (
            frontend,
            Arc::new(FrontendSpec { local: local.iter().copied().collect(), verdicts, ..FrontendSpec::clone(&spec) }),
        )
    };
    assert!(world.set(&[of(&[], Action::Drop)]).is_clean());
    assert_eq!(world.servers(), ["203.0.113.1:80 10.244.1.1=1 10.244.1.2=1"]);
    world.done();
    assert!(world.set(&[of(&spec.all[..1], Action::PickLocal)]).is_clean());
    let mut servers = world.servers();
    servers.sort();
    assert_eq!(servers, ["203.0.113.1:80 10.244.1.1=1 10.244.1.2=0", "mark 10.244.1.1=1 10.244.1.2=1"]);
    let runs = fs::read_to_string(world.dir.path().join("runs")).unwrap().lines().count();
    let done = world.done();
    let before = |what: &str| done.iter().any(|done| done.ends_with(what) && !done.starts_with(&format!("{runs}:")));
    for what in ["mark add", "mark 10.244.1.1=1", "mark 10.244.1.2=1", "203.0.113.1:80 10.244.1.2=0"] {
        assert!(before(what), "{what} comes after the table: {done:?}");
    }
}

#[test]
fn what_the_table_does_not_take_is_not_served() {
    let mut world = World::new();
    let [old, new] = [1, 2].map(|last| serving(&format!("10.96.0.{last}"), CLUSTER_IP, &[last]));
    assert!(world.set(&[old]).is_clean());
    list_fake(world.dir.path(), &world.ipvs.gate);
    world.fails("change");
    let changed = serving("10.96.0.1", CLUSTER_IP, &[3]);
    let report = world.set(&[changed, new]);
    assert_eq!(report.failed.len(), 2, "{report:?}");
    // Of the new one the table says nothing, so there is nobody; of the old one it does.
    assert_eq!(world.servers(), ["10.96.0.1:80 10.244.1.1=0 10.244.1.3=1", "10.96.0.2:80"]);
    assert_eq!(world.bound(), ["10.96.0.1"], "nor does the node's own answer there");
    // All rules are gone, and there is no way to make them again: everybody is refused.
    fs::remove_file(world.dir.path().join("table")).unwrap();
    assert!(!world.ipvs.gate.observe().unwrap().is_empty());
    let report = world.resync();
    assert_eq!(report.failed.len(), 2, "{report:?}");
    assert!(world.servers().iter().all(|server| !server.contains("=1")), "{:?}", world.servers());
    world.fails("");
    assert_eq!(world.resync().failed, BTreeMap::new());
    let last = world.servers();
    assert!(last[0].contains("10.244.1.3=1") && last[1].contains("10.244.1.2=1"), "{last:?}");
    assert_eq!(world.bound(), ["10.96.0.1", "10.96.0.2"]);
}

#[test]
fn one_that_is_refused_is_nobody_elses_trouble() {
    let mut world = World::new();
    world.kernel.state().refuses = Some([10, 244, 1, 255].into());
    let bad = serving("10.96.0.1", CLUSTER_IP, &[1, 255]);
    let [gone, stays] = [2, 3].map(|last| serving(&format!("10.96.0.{last}"), CLUSTER_IP, &[last]));
    assert!(world.set(&[gone.clone(), stays.clone()]).is_clean());
    // In one batch: what is deleted is deleted.
    let mut to = world.desired.clone();
    to.frontends.remove(&gone.0);
    to.guards.remove(&gone.0.addr);
    to.frontends.insert(bad.0, bad.1.clone());
    let report = world.apply(to);
    assert_eq!(report.failed.keys().copied().collect::<Vec<_>>(), [bad.0]);
    assert_eq!(
        world.servers(),
        ["10.96.0.1:80 10.244.1.1=1", "10.96.0.2:80 10.244.1.2=0", "10.96.0.3:80 10.244.1.3=1"]
    );
    world.look();
    assert_eq!(world.servers().len(), 2, "{:?}", world.servers());
    let listed = fs::read_to_string(world.dir.path().join("listed")).unwrap_or_default().lines().count();
    assert_eq!(world.ipvs.apply(&Changes { set: [bad.clone()].into(), ..Changes::default() }).failed.len(), 1);
    let again = fs::read_to_string(world.dir.path().join("listed")).unwrap_or_default().lines().count();
    assert_eq!(listed, again, "nothing is listed for it");
    let mut drift = Drift::default();
    world.ipvs.compare(&mut drift).unwrap();
    assert!(drift.is_empty(), "{drift:?}");
    // One that was deleted while nobody looked goes, beside the one that fails.
    world.desired.frontends.remove(&stays.0);
    world.desired.guards.remove(&stays.0.addr);
    world.restart();
    assert_eq!(world.resync().failed.len(), 1);
    world.look();
    assert_eq!(world.servers(), ["10.96.0.1:80 10.244.1.1=1"]);
}

#[test]
fn servers_that_are_leaving_are_ours_though_the_table_is_flushed() {
    let mut world = World::new();
    let (port, spec) = serving("192.0.2.1", FrontendKind::NodePort, &[1]);
    assert!(world.set(&[(port, spec)]).is_clean());
    world.talks_to("10.244.1.1", 1);
    assert!(world.remove(&port).is_clean());
    world.look();
    assert_eq!(world.servers(), ["192.0.2.1:80 10.244.1.1=0"]);
    world.ipvs.kernel = None;
    assert_eq!(world.resync().failed, BTreeMap::new());
    world.talks_to("10.244.1.1", 0);
    world.look();
    assert_eq!(world.servers(), Vec::<String>::new());
}

#[test]
fn an_address_of_the_nodes_own_is_never_held() {
    let mut world = World::new();
    world.kernel.state().others = vec!["192.0.2.1/24".parse().unwrap()];
    let web = serving("192.0.2.1", LOAD_BALANCER, &[1]);
    assert!(world.set(&[web]).is_clean());
    assert!(world.bound().is_empty() && !world.is_guarded("192.0.2.1"));
    assert_eq!(world.servers(), ["192.0.2.1:80 10.244.1.1=1"], "it is served as a NodePort is");
    assert_eq!(world.resync().failed, BTreeMap::new());
    assert!(world.bound().is_empty() && !world.is_guarded("192.0.2.1"));
    assert!(!world.ipvs.is_other_than_thought().unwrap());
    // It moves to another node, which answers for it now under its own name, and back.
    world.kernel.state().others = vec!["192.0.2.7/24".parse().unwrap()];
    assert!(world.ipvs.is_other_than_thought().unwrap());
    assert_eq!(world.resync().failed, BTreeMap::new());
    assert!(world.bound() == ["192.0.2.1"] && world.is_guarded("192.0.2.1"));
    world.kernel.state().others = vec!["192.0.2.1/32".parse().unwrap()];
    world.talks_to("10.244.1.1", 1);
    assert!(world.ipvs.is_other_than_thought().unwrap());
    assert_eq!(world.resync().failed, BTreeMap::new());
    assert!(world.bound().is_empty() && !world.is_guarded("192.0.2.1"));
    assert!(!world.ipvs.is_other_than_thought().unwrap());
}

#[test]
fn another_nodes_address_is_left_to_it() {
    let mut world = World::new();
    world.kernel.state().neighbours = [([192, 0, 2, 2].into(), vec![2])].into();
    let [there, endpoint] = ["192.0.2.2", "10.244.1.9"].map(|addr| serving(addr, LOAD_BALANCER, &[1]));
    let report = world.set(&[there.clone(), endpoint.clone()]);
    assert_eq!(report.failed.into_keys().collect::<Vec<_>>(), [there.0]);
    assert_eq!(world.bound(), ["10.244.1.9"]);
    // A process of that node's is somebody's endpoint.
    assert!(world.set(&[serving("10.96.0.1", CLUSTER_IP, &[9])]).is_clean());
    assert!(world.ipvs.is_other_than_thought().unwrap());
    let report = world.resync();
    assert_eq!(report.failed.into_keys().collect::<BTreeSet<_>>(), [there.0, endpoint.0].into());
    world.look();
    assert_eq!(world.bound(), ["10.96.0.1"]);
    assert!(!world.ipvs.is_other_than_thought().unwrap());
}

#[test]
fn what_the_node_takes_over_is_let_go_at_once() {
    let mut world = World::new();
    let (dns, spec) = serving("10.96.0.10", CLUSTER_IP, &[1]);
    assert!(world.set(&[(dns, spec.clone())]).is_clean());
    world.talks_to("10.244.1.1", 1);
    // A cache of the node's.
    world.kernel.state().others = vec!["10.96.0.10/32".parse().unwrap()];
    let mut to = world.desired.clone();
    to.guards.remove(&dns.addr);
    to.frontends.insert(dns, with(&spec, Action::Pass));
    assert!(world.apply(to).is_clean());
    assert!(world.bound().is_empty() && !world.is_guarded("10.96.0.10"));
    assert_eq!(world.servers(), ["10.96.0.10:80 10.244.1.1=0"], "its connections go on");
    // A Service that is deleted is refused until its last connection is over.
    let web = serving("10.96.0.11", CLUSTER_IP, &[2]);
    assert!(world.set(std::slice::from_ref(&web)).is_clean());
    world.talks_to("10.244.1.2", 1);
    assert!(world.remove(&web.0).is_clean());
    world.look();
    assert!(world.bound() == ["10.96.0.11"] && world.is_guarded("10.96.0.11"));
    world.talks_to("10.244.1.2", 0);
    world.look();
    assert!(world.bound().is_empty() && !world.is_guarded("10.96.0.11"));
}

#[test]
fn a_marks_server_keeps_its_own_address_alone() {
    let mut world = World::new();
    let local = |addr: &str, last: u8| {
        let (frontend, spec) = serving(addr, LOAD_BALANCER, &[last]);
        let mut spec = FrontendSpec::clone(&spec);
        spec.local = spec.all.clone();
        spec.verdicts.external.action = Action::PickLocal;
        (frontend, Arc::new(spec))
    };
    let [long, short] = [1, 2].map(|last| local(&format!("203.0.113.{last}"), last));
    assert!(world.set(&[long.clone(), short.clone()]).is_clean());
    world.talks_to("10.244.1.1", 1);
    assert!(world.remove(&long.0).is_clean());
    assert!(world.remove(&short.0).is_clean());
    world.look();
    assert_eq!(world.bound(), ["203.0.113.1"], "{:?}", world.servers());
}

#[test]
fn what_was_set_before_is_not_forgotten() {
    let mut world = World::new();
    let alias = |world: &World| world.kernel.state().device.as_ref().map(|device| device.alias.clone());
    assert_eq!(alias(&world).unwrap(), "before: conntrack=0");
    world.kernel.state().device = None;
    assert_eq!(world.resync().failed, BTreeMap::new());
    assert_eq!(alias(&world).unwrap(), "before: conntrack=0", "by now we have set it");
    // Killed between the device and its alias.
    world.restart();
    {
        let mut state = world.kernel.state();
        state.settings = "conntrack=0";
        state.device.as_mut().unwrap().alias.clear();
    }
    assert_eq!(world.resync().failed, BTreeMap::new());
    assert_eq!(alias(&world).unwrap(), "before: conntrack=0");
    // The next one has more to set.
    world.restart();
    world.kernel.state().further = " arp_ignore=0";
    assert_eq!(world.resync().failed, BTreeMap::new());
    assert_eq!(alias(&world).unwrap(), "before: conntrack=0 arp_ignore=0");
    assert_eq!(world.resync().writes, 0);
    world.kernel.state().device.as_mut().unwrap().is_dummy = false;
    world.desired.frontends.extend([serving("10.96.0.1", CLUSTER_IP, &[1])]);
    assert!(format!("{:?}", world.resync().failed).contains("somebody else's"));
}

#[test]
fn held_services_are_taken_in_once_they_are_known() {
    let mut world = World::new();
    let [held, gone] = [1, 2].map(|last| serving(&format!("10.96.0.{last}"), CLUSTER_IP, &[last]));
    assert!(world.set(&[held.clone(), gone.clone()]).is_clean());
    world.restart();
    let services = [&held, &gone].map(|(_, spec)| spec.service.service.clone());
    world.ipvs.hold(&services.clone().into());
    world.desired = DesiredState::default();
    let report = world.resync();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(world.servers().len(), 2, "{:?}", world.servers());
    list_fake(world.dir.path(), &world.ipvs.gate);
    // One can be read again, with another endpoint; the other one is gone.
    let now = serving("10.96.0.1", CLUSTER_IP, &[7]);
    world.desired.frontends.extend([now]);
    world.desired.guards.insert(held.0.addr);
    world.ipvs.hold(&BTreeSet::new());
    assert_eq!(world.resync().failed, BTreeMap::new());
    world.look();
    assert_eq!(world.servers(), ["10.96.0.1:80 10.244.1.7=1"]);
    assert_eq!(world.bound(), ["10.96.0.1"]);
    assert!(world.set(&[serving("10.96.0.1", CLUSTER_IP, &[8])]).is_clean());
    world.look();
    assert_eq!(world.servers(), ["10.96.0.1:80 10.244.1.8=1"]);
}

/// One whose last endpoint here is not ready, and serves on (contract A104).
#[test]
fn datagrams_go_on_while_nobody_is_chosen() {
    let mut world = World::new();
    let (mut dns, spec) = serving("10.96.0.10", CLUSTER_IP, &[1]);
    dns.protocol = Protocol::Udp;
    let mut spec = FrontendSpec::clone(&spec);
    spec.service.protocol = Protocol::Udp;
    spec.alive = Some(spec.all.clone());
    assert!(world.set(&[(dns, Arc::new(spec.clone()))]).is_clean());
    assert!(world.set(&[(dns, with(&spec, Action::Drop))]).is_clean());
    assert_eq!(world.servers(), ["10.96.0.10:80 10.244.1.1=0"]);
    spec.alive = Some(BackendSet::from([]));
    assert!(world.set(&[(dns, with(&spec, Action::Drop))]).is_clean());
    assert_eq!(world.servers(), Vec::<String>::new());
}

/// Another mode took over, and did not come to the end of it before this one is back.
#[test]
fn what_was_retired_is_taken_up_again() {
    let mut world = World::new();
    let [web, gone] = [1, 2].map(|last| serving(&format!("10.96.0.{last}"), CLUSTER_IP, &[last]));
    assert!(world.set(&[web.clone(), gone.clone()]).is_clean());
    world.talks_to("10.244.1.2", 1);
    {
        let mut state = world.kernel.state();
        state.routed = std::mem::take(&mut state.bound);
        for (_, held) in state.servers.values_mut() {
            held.values_mut().for_each(|held| held.destination.weight = 0);
        }
    }
    world.desired.frontends.remove(&gone.0);
    world.desired.guards.remove(&gone.0.addr);
    world.restart();
    assert!(world.resync().is_clean());
    assert_eq!(world.servers(), ["10.96.0.1:80 10.244.1.1=1", "10.96.0.2:80 10.244.1.2=0"]);
    assert!(world.bound() == ["10.96.0.1", "10.96.0.2"] && world.kernel.state().routed.is_empty());
    let done = world.done();
    let at =
        |what: &str| done.iter().position(|done| done.ends_with(what)).unwrap_or_else(|| panic!("{what}: {done:?}"));
    assert!(at(": hold 10.96.0.2") < at("let go 10.96.0.2"), "it is the node's all the time: {done:?}");
    assert!(!done[at(": hold 10.96.0.2")].starts_with("0:"), "the table comes before, which masquerades: {done:?}");
    world.talks_to("10.244.1.2", 0);
    world.look();
    assert_eq!(world.bound(), ["10.96.0.1"], "nobody's connection leads there any more");
}
