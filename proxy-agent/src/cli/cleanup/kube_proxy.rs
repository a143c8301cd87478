//! What kube-proxy leaves behind when it is stopped, and how it goes: virtual servers and the device of its IPVS mode, its tables of nftables,
//! its chains in those of iptables, of either flavour, and the sets that those ask. What is the kubelet's stays, as with `kube-proxy --cleanup`;
//! nobody else's rule is touched but to take a jump out of it.

use std::{collections::BTreeSet, fs, io, thread, time::Duration};

use anyhow::{Context, bail};

use crate::{
    dataplane::{
        ipvs::{
            codec::Virtual,
            kube_proxy::{self as ipvs, NodePorts},
        },
        netfilter::{conntrack::Socket, ip, ipset::Sets, tool::Tool},
    },
    model::{Family, Protocol},
};

/// Accepts what it translates where the firewall drops what is forwarded.
const FORWARD: &str = "KUBE-FORWARD";

/// Its table in nftables mode.
pub(in crate::cli) const TABLE: &str = "kube-proxy";
/// The device of its IPVS mode.
pub(in crate::cli) const DEVICE: &str = ipvs::DEVICE;

/// Tables of iptables that it writes to.
const TABLES: [&str; 3] = ["nat", "filter", "mangle"];

/// Its chains, in whichever table. `KUBE-FIREWALL`, `KUBE-MARK-DROP`, `KUBE-KUBELET-CANARY` and `KUBE-IPTABLES-HINT` are the kubelet's.
const CHAINS: [&str; 14] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    FORWARD,
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    // Of its IPVS mode.
    "KUBE-NODE-PORT",
    "KUBE-LOAD-BALANCER",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-FIRE-WALL",
];

/// Of Services and endpoints; the last one is of versions before 1.24.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-", "KUBE-XLB-"];

/// Its sets, of IPVS mode, as they are called for IPv4. kube-router's are called `KUBE-…`, too.
const SETS: [&str; 17] = [
    "KUBE-LOOP-BACK",
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-LOCAL",
    "KUBE-LOAD-BALANCER-FW",
    "KUBE-LOAD-BALANCER-SOURCE-IP",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-NODE-PORT-TCP",
    "KUBE-NODE-PORT-LOCAL-TCP",
    "KUBE-NODE-PORT-UDP",
    "KUBE-NODE-PORT-LOCAL-UDP",
    "KUBE-NODE-PORT-SCTP-HASH",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
    "KUBE-HEALTH-CHECK-NODE-PORT",
    "KUBE-IPVS-IPS",
];
/// Those of them that list node ports, and of which protocol.
const NODE_PORTS: [(&str, Protocol); 3] = [
    ("KUBE-NODE-PORT-TCP", Protocol::Tcp),
    ("KUBE-NODE-PORT-UDP", Protocol::Udp),
    ("KUBE-NODE-PORT-SCTP-HASH", Protocol::Sctp),
];
/// The longest name that a set can have.
const LONGEST: usize = 31;

const PATIENCE: Duration = Duration::from_secs(60);
/// The kernel gives back what rules of nftables held (a set) a little after they are gone.
const RELEASED_WITHIN: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(50);

/// The programs of one flavour and family.
#[derive(Debug)]
struct Flavour {
    save: &'static str,
    restore: &'static str,
    family: Family,
    /// Which tables there are, for asking for one that is not there may make it.
    listed: Listed,
}

#[derive(Clone, Copy, Debug)]
enum Listed {
    /// Among those of nftables.
    Nftables,
    /// In this file below `/proc/net`.
    Proc(&'static str),
}

const FLAVOURS: [Flavour; 4] = [
    Flavour {
        save: "iptables-nft-save",
        restore: "iptables-nft-restore",
        family: Family::V4,
        listed: Listed::Nftables,
    },
    Flavour {
        save: "ip6tables-nft-save",
        restore: "ip6tables-nft-restore",
        family: Family::V6,
        listed: Listed::Nftables,
    },
    Flavour {
        save: "iptables-legacy-save",
        restore: "iptables-legacy-restore",
        family: Family::V4,
        listed: Listed::Proc("ip_tables_names"),
    },
    Flavour {
        save: "ip6tables-legacy-save",
        restore: "ip6tables-legacy-restore",
        family: Family::V6,
        listed: Listed::Proc("ip6_tables_names"),
    },
];

/// One thing that is there.
#[derive(Debug)]
pub(super) struct Remains {
    pub(super) what: String,
    how: How,
}

#[derive(Debug)]
enum How {
    Servers(Vec<Virtual>),
    Device(u32),
    Table(Family),
    Rules {
        program: &'static str,
        args: &'static [&'static str],
        input: String,
    },
    Sets(Vec<String>),
    /// It stays.
    Needed,
}

/// What goes of what is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Extent {
    All,
    /// But for what lets connections through, also those of whoever serves in its place, where the firewall drops what nothing accepts.
    ButForwarding,
}

impl Remains {
    pub(super) fn stays(&self) -> bool {
        matches!(self.how, How::Needed)
    }

    pub(super) fn remove(&self) -> anyhow::Result<()> {
        let Self { what, how } = self;
        let done = match how {
            How::Servers(servers) => ipvs::remove_servers(servers).map_err(Into::into),
            How::Device(index) => ipvs::remove_device(*index).map_err(Into::into),
            How::Table(family) => {
                Socket::open().and_then(|socket| socket.remove_table(*family, TABLE)).map_err(Into::into)
            }
            How::Rules { program, args, input } => tool(program).run(args, input).map(drop).map_err(Into::into),
            How::Sets(names) => destroy(names),
            How::Needed => Ok(()),
        };
        done.with_context(|| what.clone())
    }
}

const fn tool(program: &'static str) -> Tool {
    Tool { program, remedy: "install the packages nftables and iptables", patience: PATIENCE }
}

/// Everything of kube-proxy's in this network namespace, in the order in which it goes.
pub(super) fn find(extent: Extent) -> anyhow::Result<Vec<Remains>> {
    let sets = Sets::open().map_err(of_sets)?;
    let names = sets.as_ref().map_or(Ok(BTreeSet::new()), Sets::names).map_err(of_sets)?;
    let mut found = of_ipvs(&sets.as_ref().map_or(Ok(NodePorts::new()), node_ports)?)?;
    found.extend(rules(extent)?);
    // Those that rules ask for stay until the rules are gone.
    let names: Vec<String> = its_sets().into_iter().filter(|name| names.contains(name)).collect();
    if !names.is_empty() {
        found.push(Remains { what: format!("{} sets of ipset", names.len()), how: How::Sets(names) });
    }
    Ok(found)
}

fn of_ipvs(node_ports: &NodePorts) -> anyhow::Result<Vec<Remains>> {
    let ipvs::Left { servers, device } = ipvs::find(node_ports)?;
    let mut found = Vec::new();
    if !servers.is_empty() {
        found.push(Remains { what: format!("{} virtual servers (IPVS)", servers.len()), how: How::Servers(servers) });
    }
    let what = || format!("device {DEVICE} with the addresses of Services (IPVS)");
    found.extend(device.map(|index| Remains { what: what(), how: How::Device(index) }));
    Ok(found)
}

fn of_sets(error: io::Error) -> anyhow::Error {
    anyhow::anyhow!("sets of ipset cannot be listed: {error}; run as root, or with CAP_NET_ADMIN")
}

fn node_ports(sets: &Sets) -> anyhow::Result<NodePorts> {
    let mut found = NodePorts::new();
    for (name, protocol) in NODE_PORTS {
        for family in Family::BOTH {
            let ports = sets.ports(&of_family(name, family)).map_err(of_sets)?;
            found.extend(ports.into_iter().map(|(port, _)| (family, protocol, port)));
        }
    }
    Ok(found)
}

fn its_sets() -> Vec<String> {
    Family::BOTH.into_iter().flat_map(|family| SETS.map(|name| of_family(name, family))).collect()
}

/// As kube-proxy names them.
fn of_family(name: &str, family: Family) -> String {
    match family {
        Family::V4 => name.to_owned(),
        Family::V6 => name.replacen("KUBE-", "KUBE-6-", 1).chars().take(LONGEST).collect(),
    }
}

/// One that somebody else's rule asks for stays, and is named; the others go all the same.
fn destroy(names: &[String]) -> anyhow::Result<()> {
    let Some(sets) = Sets::open().map_err(of_sets)? else { return Ok(()) };
    let mut left = RELEASED_WITHIN;
    let mut failed = Ok(());
    for name in names {
        let done = loop {
            match sets.destroy(name) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && !left.is_zero() => {
                    thread::sleep(AGAIN);
                    left = left.saturating_sub(AGAIN);
                }
                done => break done,
            }
        };
        failed = failed.and(done.with_context(|| format!("set {name}")));
    }
    failed
}

fn rules(extent: Extent) -> anyhow::Result<Vec<Remains>> {
    let tables = tables()?;
    let mut found = Vec::new();
    for (family, name) in tables.iter().filter(|(_, name)| name == TABLE) {
        let what = format!("table {} {name} (nftables)", ip(*family));
        found.push(Remains { what, how: How::Table(*family) });
    }
    for flavour in &FLAVOURS {
        let Flavour { save, restore, family, listed } = flavour;
        let names = match listed {
            Listed::Nftables => tables.iter().filter(|(of, _)| of == family).map(|(_, name)| name.clone()).collect(),
            Listed::Proc(file) => names(file),
        };
        for table in TABLES.into_iter().filter(|table| names.contains(*table)) {
            let text = tool(save).run(&["-t", table], "")?;
            let needed = Some(FORWARD).filter(|_| extent == Extent::ButForwarding && drops_forwarded(&text));
            if let Some(chain) = needed.filter(|needed| text.lines().filter_map(chain).any(|name| name == *needed)) {
                found.push(Remains { what: format!("chain {chain} in table {table} ({save})"), how: How::Needed });
            }
            if let Some((what, input)) = removal(&text, table, needed) {
                found.push(Remains {
                    what: format!("{what} in table {table} ({save})"),
                    how: How::Rules { program: restore, args: &["--noflush", "--counters", "-w", "5"], input },
                });
            }
        }
    }
    Ok(found)
}

/// Tables of nftables; a kernel that has no nftables has none of them.
fn tables() -> anyhow::Result<BTreeSet<(Family, String)>> {
    let mut found = BTreeSet::new();
    let socket = match Socket::open() {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(found),
        Err(error) => bail!("netfilter's netlink: {error}"),
    };
    for family in Family::BOTH {
        match socket.tables(family) {
            Ok(names) => found.extend(names.into_iter().map(|name| (family, name))),
            Err(error) if [Some(libc::EINVAL), Some(libc::EOPNOTSUPP)].contains(&error.raw_os_error()) => {}
            Err(error) => bail!("tables of nftables cannot be listed: {error}; run as root, or with CAP_NET_ADMIN"),
        }
    }
    Ok(found)
}

fn names(file: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Whether what is forwarded is dropped or refused unless a rule accepts it, by what `iptables-save -t filter` printed.
fn drops_forwarded(text: &str) -> bool {
    text.lines().any(|line| {
        let rule = line.split_once("-A FORWARD ").map_or("", |(_, rule)| rule);
        line.starts_with(":FORWARD DROP ") || rule.starts_with("-j DROP") || rule.starts_with("-j REJECT")
    })
}

/// How many there are, and what `iptables-restore` is to be told; `text` is what `iptables-save -t` printed, `needed` a chain that stays.
fn removal(text: &str, table: &str, needed: Option<&str>) -> Option<(String, String)> {
    let goes = |name: &&str| is_its(name) && Some(*name) != needed;
    let chains: BTreeSet<&str> = text.lines().filter_map(chain).filter(goes).collect();
    if chains.is_empty() {
        return None;
    }
    let jumps: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_once("-A "))
        .map(|(_, rule)| rule)
        .filter(|rule| {
            let owner = rule.split(' ').next().unwrap_or_default();
            !chains.contains(owner) && target(rule).is_some_and(|to| chains.contains(to))
        })
        .collect();
    // A chain that is declared is flushed first, so nothing refers to another one any more when they go.
    let declared = chains.iter().map(|chain| format!(":{chain} - [0:0]\n"));
    let unlinked = jumps.iter().map(|rule| format!("-D {rule}\n"));
    let gone = chains.iter().map(|chain| format!("-X {chain}\n"));
    let lines: String = declared.chain(unlinked).chain(gone).collect();
    let count = format!("{} chains, {} jumps", chains.len(), jumps.len());
    Some((count, format!("*{table}\n{lines}COMMIT\n")))
}

/// The chain that a line declares.
fn chain(line: &str) -> Option<&str> {
    line.strip_prefix(':')?.split(' ').next()
}

/// Where a rule leads. A comment is in quotes, and may hold anything.
fn target(rule: &str) -> Option<&str> {
    let (mut quoted, mut escaped) = (false, false);
    let end_of_quotes = rule.char_indices().fold(0, |end, (at, c)| {
        let quote = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        if quote {
            quoted = !quoted;
        }
        if quote && !quoted { at + 1 } else { end }
    });
    // The target comes after all matches.
    let mut words = rule.get(end_of_quotes..)?.split(' ');
    words.find(|word| matches!(*word, "-j" | "-g"))?;
    words.next()
}

fn is_its(chain: &str) -> bool {
    CHAINS.contains(&chain) || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAT: &str = "# Generated by iptables-nft-save v1.8.9\n*nat\n:PREROUTING ACCEPT [1:2]\n:POSTROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n\
        :KUBE-SVC-AAAA - [0:0]\n:KUBE-FIREWALL - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-ROUTER-SNAT - [0:0]\n:MINE - [0:0]\n\
        -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n-A PREROUTING -m comment --comment \"say \\\" -j KUBE-SERVICES\" -j MINE\n\
        -A MINE -d 10.0.0.1/32 -g KUBE-SERVICES\n-A KUBE-SERVICES -j KUBE-SVC-AAAA\n-A POSTROUTING -j KUBE-FIREWALL\nCOMMIT\n";

    #[test]
    fn only_its_own_and_what_leads_there_goes() {
        let (count, input) = removal(NAT, "nat", None).unwrap();
        assert_eq!(count, "2 chains, 2 jumps");
        assert_eq!(
            input,
            "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-AAAA - [0:0]\n-D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -D MINE -d 10.0.0.1/32 -g KUBE-SERVICES\n-X KUBE-SERVICES\n-X KUBE-SVC-AAAA\nCOMMIT\n"
        );
        assert_eq!(removal("*filter\n:INPUT ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\nCOMMIT\n", "filter", None), None);
        assert_eq!(removal("", "mangle", None), None);
    }

    /// As docker, ufw and firewalld leave the chain.
    #[test]
    fn what_lets_through_stays_where_forwarding_is_dropped() {
        let filter = "*filter\n:FORWARD DROP [0:0]\n:KUBE-FORWARD - [0:0]\n:KUBE-SERVICES - [0:0]\n-A FORWARD -j KUBE-FORWARD\n\
             -A FORWARD -j KUBE-SERVICES\n-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n";
        assert!(drops_forwarded(filter));
        let open = filter.replace("FORWARD DROP", "FORWARD ACCEPT");
        assert!(!drops_forwarded(&open) && !drops_forwarded(NAT));
        for last in ["DROP", "REJECT --reject-with icmp-host-prohibited"] {
            assert!(drops_forwarded(&open.replace("COMMIT", &format!("-A FORWARD -j {last}\nCOMMIT"))), "{last}");
        }
        assert!(!drops_forwarded(&open.replace("COMMIT", "-A FORWARD -i eth7 -j DROP\nCOMMIT")));
        let (count, input) = removal(filter, "filter", Some(FORWARD)).unwrap();
        assert_eq!(count, "1 chains, 1 jumps");
        assert!(!input.contains(FORWARD) && input.contains("-D FORWARD -j KUBE-SERVICES"), "{input}");
        let (count, _) = removal(filter, "filter", None).unwrap();
        assert_eq!(count, "2 chains, 2 jumps");
    }

    #[test]
    fn its_sets_of_both_families_have_its_own_names() {
        let names = its_sets();
        assert_eq!(names.len(), 34);
        for name in ["KUBE-IPVS-IPS", "KUBE-6-IPVS-IPS", "KUBE-6-LOAD-BALANCER-SOURCE-CID", "KUBE-6-NODE-PORT-TCP"] {
            assert!(names.iter().any(|one| one == name), "{name}");
        }
        assert!(NODE_PORTS.iter().all(|(name, _)| SETS.contains(name)));
    }
}
