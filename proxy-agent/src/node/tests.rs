//! Devices of a real network namespace, live. Needs root.

use std::process::Command;

use super::*;
use crate::desired::DeviceRole;

fn sh(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until the devices are as `wanted` says.
async fn until(devices: &mut watch::Receiver<Devices>, what: &str, wanted: impl Fn(&Devices) -> bool) -> Devices {
    let found =
        tokio::time::timeout(Duration::from_secs(5), async { devices.wait_for(wanted).await.unwrap().clone() }).await;
    match found {
        Ok(found) => found,
        Err(_) => panic!("{what}: {:?}", devices.borrow()),
    }
}

/// Waits until the node's own addresses are these (link-local ones are the kernel's to choose).
async fn own(told: &mut mpsc::Receiver<Event>, wanted: &str) {
    let mut last = String::new();
    let heard = async {
        while let Some(Event::Addresses(addresses)) = told.recv().await {
            let shown: Vec<String> =
                addresses.iter().map(ToString::to_string).filter(|ip| !ip.starts_with("fe80:")).collect();
            last = shown.join(" ");
            if last == wanted {
                return true;
            }
        }
        false
    };
    let found = tokio::time::timeout(Duration::from_secs(5), heard).await;
    assert_eq!(found.ok(), Some(true), "{last:?} is not {wanted:?}");
}

/// The problems that are told next.
async fn problems(told: &mut mpsc::Receiver<Event>) -> BTreeMap<String, Vec<String>> {
    let heard = async {
        loop {
            if let Event::Problems(Teller::Devices, problems) = told.recv().await.unwrap() {
                return problems;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), heard).await.expect("nothing is told of problems")
}

/// An option of a socket that is a plain number; `None` if this is no socket.
fn option<T: Default>(fd: i32, name: i32) -> Option<T> {
    let (mut value, mut len) = (T::default(), size_of::<T>() as libc::socklen_t);
    // SAFETY: `value` has room for the `len` bytes that the kernel may write; a descriptor that is none fails.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len) };
    (result == 0).then_some(value)
}

/// Puts something that answers nothing in the place of this namespace's netlink sockets; how many.
fn break_netlink() -> usize {
    const SO_NETNS_COOKIE: i32 = 71;
    let probe = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let own: Option<u64> = option(std::os::fd::AsRawFd::as_raw_fd(&probe), SO_NETNS_COOKIE);
    let null = std::fs::File::open("/dev/null").unwrap();
    let fds: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .collect();
    let netlink = fds
        .into_iter()
        .filter(|fd| option(*fd, libc::SO_DOMAIN) == Some(libc::AF_NETLINK) && option(*fd, SO_NETNS_COOKIE) == own);
    netlink
        .map(|fd| {
            // SAFETY: both descriptors are open; who owns `fd` closes whatever it names.
            assert_eq!(unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&null), fd) }, fd);
        })
        .count()
}

fn roles(devices: &Devices) -> Vec<(String, DeviceRole)> {
    devices.values().map(|d| (d.name.clone(), d.role)).collect()
}

/// A process that only keeps a network namespace alive.
struct Pod(std::process::Child);

impl Pod {
    fn new() -> Self {
        let child = Command::new("unshare").args(["--net", "sleep", "60"]).spawn().unwrap();
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let theirs = format!("/proc/{}/ns/net", child.id());
        while std::fs::read_link(&theirs).map_or(true, |ns| ns == own) {
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn devices_are_followed_as_they_come_and_go() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP devices_are_followed_as_they_come_and_go: not root");
        return;
    }
    // This thread alone, and what it starts.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (pod, uplink) = (Pod::new(), Pod::new());
        sh(&format!(
            "ip link set lo up && ip link add eth0 type veth peer name up netns {} && ip link set eth0 up && \
             ip addr add 192.168.9.2/24 dev eth0 && ip addr add fd00:9::2/64 dev eth0 nodad",
            uplink.0.id()
        ));
        let (sender, mut devices) = watch::channel(Devices::new());
        let cancel = CancellationToken::new();
        let (known, facts) = watch::channel(None);
        let (events, mut told) = mpsc::channel(64);
        let running = tokio::spawn(run(Options::default(), facts, events, sender, cancel.clone()));
        // The addresses are told at once, of every scope.
        own(&mut told, "127.0.0.1 192.168.9.2 ::1 fd00:9::2").await;
        // Nothing is said of devices before the node's facts are known.
        assert!(tokio::time::timeout(Duration::from_millis(200), devices.changed()).await.is_err());
        known.send_replace(Some(Arc::default()));

        let found = until(&mut devices, "eth0", |d| d.len() == 1).await;
        assert_eq!(roles(&found), [("eth0".into(), DeviceRole::Outward)]);
        let eth0 = found.values().next().unwrap();
        assert_eq!(eth0.source4, Some([192, 168, 9, 2].into()));
        assert_eq!(eth0.source6, Some("fd00:9::2".parse().unwrap()));

        sh(&format!("ip link add pod1 index 900 type veth peer name eth0 netns {}", pod.0.id()));
        let found = until(&mut devices, "pod1", |d| d.contains_key(&900)).await;
        assert_eq!((found[&900].role, found[&900].source4), (DeviceRole::Pod, Some([192, 168, 9, 2].into())));
        // Both have a peer elsewhere; only a pod's is of use.
        assert!(found[&900].netns.is_some());
        assert!(found.values().all(|d| d.role == DeviceRole::Pod || d.netns.is_none()));

        sh("ip link add cni0 type bridge && ip addr add 10.244.1.1/24 dev cni0 && ip link set cni0 up && \
            ip link set pod1 master cni0");
        let found = until(&mut devices, "master", |d| d[&900].source4 == Some([10, 244, 1, 1].into())).await;
        assert!(found.values().all(|d| d.name != "cni0"));

        // A gateway address of the whole pod network on a pod's link: only who knows the pod network can tell.
        sh(&format!(
            "ip link add ptp1 index 901 type veth peer name eth0 netns {} && ip addr add 10.244.2.1/24 dev ptp1 && \
             ip link set ptp1 up",
            uplink.0.id()
        ));
        until(&mut devices, "ptp1", |d| d.get(&901).is_some_and(|p| p.role == DeviceRole::Outward)).await;
        let facts = NodeFacts { pod_cidrs: vec!["10.244.2.0/24".parse().unwrap()], ..Default::default() };
        known.send_replace(Some(Arc::new(facts)));
        until(&mut devices, "node address", |d| d.get(&901).is_some_and(|p| p.role == DeviceRole::Pod)).await;
        sh("ip link del ptp1");
        until(&mut devices, "ptp1 gone", |d| !d.contains_key(&901)).await;
        known.send_replace(Some(Arc::default()));

        sh("ip link set pod1 name pod9");
        until(&mut devices, "rename", |d| d[&900].name == "pod9").await;

        // Gone and another there, faster than anybody looks: published all the same.
        devices.mark_unchanged();
        sh(&format!(
            "ip link del pod9 && ip link add pod9 index 900 type veth peer name eth0 netns {} && \
                     ip link set pod9 master cni0",
            pod.0.id()
        ));
        tokio::time::timeout(Duration::from_secs(5), devices.changed()).await.unwrap().unwrap();

        own(&mut told, "10.244.1.1 127.0.0.1 192.168.9.2 ::1 fd00:9::2").await;
        sh("ip addr add 192.168.9.3/32 dev lo");
        own(&mut told, "10.244.1.1 127.0.0.1 192.168.9.2 192.168.9.3 ::1 fd00:9::2").await;
        sh("ip addr del 192.168.9.3/32 dev lo");
        sh("ip addr flush dev cni0 && ip link del cni0");
        own(&mut told, "127.0.0.1 192.168.9.2 ::1 fd00:9::2").await;
        until(&mut devices, "no master", |d| d.get(&900).is_some_and(|p| p.source4 == Some([192, 168, 9, 2].into())))
            .await;

        // An uplink without an address counts once it has a default route.
        sh(&format!("ip link add wan type veth peer name up2 netns {} && ip link set wan up", uplink.0.id()));
        until(&mut devices, "wan", |d| d.values().any(|d| d.name == "wan" && d.role == DeviceRole::Pod)).await;
        sh("ip route add default dev wan");
        until(&mut devices, "route", |d| d.values().any(|d| d.name == "wan" && d.role == DeviceRole::Outward)).await;
        sh("ip link del pod9");
        until(&mut devices, "gone", |d| !d.contains_key(&900)).await;

        // The kernel does not answer any more: what was seen last stands, and a new connection takes over.
        let before = devices.borrow_and_update().clone();
        assert_eq!(break_netlink(), 1);
        known.send_replace(Some(Arc::new(NodeFacts { zone: Some("z".into()), ..Default::default() })));
        let said = problems(&mut told).await;
        assert!(said["network devices"][0].contains("tried again"), "{said:?}");
        assert!(!devices.has_changed().unwrap() && *devices.borrow() == before);
        sh(&format!("ip link add pod2 index 902 type veth peer name eth1 netns {}", pod.0.id()));
        assert!(problems(&mut told).await.is_empty());
        until(&mut devices, "seen anew", |d| d.contains_key(&902)).await;
        sh("ip link del pod2");
        until(&mut devices, "followed again", |d| !d.contains_key(&902)).await;

        cancel.cancel();
        running.await.unwrap().unwrap();
    });
}

#[test]
fn a_bridge_says_whether_it_filters_vlans() {
    for filters in [true, false] {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName("br0".into()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Bridge),
                LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::AgeingTime(1), InfoBridge::VlanFiltering(filters)])),
            ]),
        ];
        let link = link_of(message);
        assert_eq!((link.kind.as_str(), link.vlan_filtering), ("bridge", filters));
    }
}

#[test]
fn ipsec_policies_keep_xdp_off() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP ipsec_policies_keep_xdp_off: not root");
        return;
    }
    // This thread alone, and what it starts.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    if !Command::new("ip").args(["xfrm", "policy", "flush"]).status().unwrap().success() {
        println!("SKIP ipsec_policies_keep_xdp_off: no IPsec in this kernel");
        return;
    }
    let policy = |change: &str, direction: &str| {
        let ends = "src 192.0.2.0/24 dst 203.0.113.0/24";
        let how = if change == "add" { "tmpl src 192.168.9.2 dst 192.168.9.3 proto esp mode tunnel" } else { "" };
        sh(&format!("ip xfrm policy {change} {ends} dir {direction} {how}"));
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let far = Pod::new();
        sh(&format!(
            "ip link add eth0 index 900 type veth peer name up netns {} && ip addr add 192.168.9.2/24 dev eth0 && ip link set eth0 up",
            far.0.id()
        ));
        policy("add", "out");
        let (sender, mut devices) = watch::channel(Devices::new());
        let cancel = CancellationToken::new();
        let (_known, facts) = watch::channel(Some(Arc::default()));
        let (events, mut told) = mpsc::channel(64);
        let options = Options { xdp: true, ..Options::default() };
        let running = tokio::spawn(run(options, facts, events, sender, cancel.clone()));
        tokio::spawn(async move { while told.recv().await.is_some() {} });
        let is_off = |d: &Devices| d.get(&900).is_some_and(|d| d.without_xdp.is_some_and(|why| why.contains("IPsec")));
        let is_on = |d: &Devices| d.get(&900).is_some_and(|d| d.without_xdp.is_none());
        until(&mut devices, "there before", is_off).await;
        policy("delete", "out");
        until(&mut devices, "gone", is_on).await;
        for direction in ["in", "fwd", "out"] {
            policy("add", direction);
            until(&mut devices, direction, is_off).await;
            sh("ip xfrm policy flush");
            until(&mut devices, "flushed", is_on).await;
        }
        // Nothing passes that no policy is for. What ip is too old to say cannot be tried.
        if Command::new("ip").args(["xfrm", "policy", "setdefault", "fwd", "block"]).status().unwrap().success() {
            until(&mut devices, "blocked", is_off).await;
            sh("ip xfrm policy setdefault fwd accept");
            until(&mut devices, "let through", is_on).await;
        } else {
            println!("ip xfrm policy setdefault: not known");
        }
        cancel.cancel();
        running.await.unwrap().unwrap();

        // While the kernel's stream cannot be had, too.
        let known = devices.borrow().clone();
        assert!(is_on(&known));
        let (sender, mut devices) = watch::channel(known);
        let mut watcher = Watcher {
            options: Options { xdp: true, ..Options::default() },
            facts: watch::channel(None).1,
            events: mpsc::channel(1).0,
            devices: sender,
            pause: LONGEST_PAUSE,
            routes: BTreeSet::new(),
            addresses: None,
            ipsec: None,
        };
        let resting = tokio::spawn(async move { watcher.rest().await });
        assert!(tokio::time::timeout(ASK / 2, devices.changed()).await.is_err(), "there is none");
        policy("add", "out");
        until(&mut devices, "nobody told", is_off).await;
        resting.abort();
        sh("ip xfrm policy flush");
    });
}
