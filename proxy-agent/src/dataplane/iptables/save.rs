//! What `iptables-save` prints, as far as it concerns us: our own chains, and rules elsewhere that lead to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use super::{
    loopback,
    render::{ChainName, GUARD, LOOPBACK, MARK_OTHERS, PREFIX, Piece, Rules, SCRATCH, Table, Tree},
};
use crate::{
    desired::Frontend,
    model::{Port, Protocol, ServiceKey, ServicePortName},
};

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Saved {
    pub(super) chains: BTreeMap<ChainName, Rules>,
    /// Rules of others' chains that lead to ours: `CHAIN RULE`.
    pub(super) jumps: Vec<(Table, String)>,
    /// Rules that are not ours.
    pub(super) others: usize,
    /// The kubelet's own chains are here.
    pub(super) kubelet: bool,
}

/// Chains that the kubelet makes to show which flavour of iptables it uses.
const KUBELET: [&str; 2] = ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"];

/// Chains of ours that are of a ServicePort.
const KINDS: [&str; 6] = ["INT", "EXT", "FW", "SVC", "SVL", "SEP"];
/// All that is left of what is retired.
pub(super) const RETIRED: &str = "PROXY-RETIRED";

/// Chains of ours that there is one of.
const FIXED: [&str; 16] = [
    "SERVICES",
    "POD-SERVICES",
    "PODS",
    "MARK-MASQ",
    "MARK-OTHERS",
    "POSTROUTING",
    "HAIRPIN",
    "REJECT",
    "DROP",
    "GUARD",
    "FORWARD",
    "INVALID",
    "NODEPORTS",
    "LOOPBACK",
    "CANARY",
    "RETIRED",
];

fn own(name: &str) -> Option<&str> {
    name.strip_prefix(PREFIX).or_else(|| name.strip_prefix(SCRATCH))
}

fn has_hash(name: &str, kinds: &[&str]) -> bool {
    let rest = own(name).and_then(|rest| rest.split_once('-'));
    rest.is_some_and(|(kind, hash)| {
        kinds.contains(&kind)
            && hash.len() == 16
            && hash.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b))
    })
}

/// Whether a chain is ours: others may like the prefix, too.
pub(super) fn is_ours(name: &str) -> bool {
    own(name).is_some_and(|rest| FIXED.contains(&rest)) || has_hash(name, &KINDS) || is_block(name)
}

fn is_block(name: &str) -> bool {
    has_hash(name, &["NET"])
}

/// Words of a rule, those in quotes as one.
fn words(rule: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut escaped, mut any) = (false, false, false);
    for c in rule.chars() {
        match c {
            _ if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' if quoted => escaped = true,
            '"' => (quoted, any) = (!quoted, true),
            ' ' if !quoted => {
                if any || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            _ => word.push(c),
        }
    }
    if any || !word.is_empty() {
        words.push(word);
    }
    words
}

/// The word behind one of `options`.
fn value(words: &[String], options: &[&str]) -> Option<String> {
    let at = words.iter().position(|word| options.contains(&word.as_str()))?;
    words.get(at + 1).cloned()
}

/// Where a rule leads.
fn target(rule: &str) -> Option<String> {
    value(&words(rule), &["-j", "-g"])
}

impl Saved {
    /// What cannot be read is somebody else's.
    pub(super) fn parse(&mut self, text: &str) {
        let mut table = None;
        for line in text.lines() {
            let line = line.trim_end();
            if let Some(name) = line.strip_prefix('*') {
                table = Table::ALL.into_iter().find(|table| table.name() == name);
            } else if let Some(chain) = line.strip_prefix(':') {
                let name = chain.split(' ').next().unwrap_or_default();
                self.kubelet |= KUBELET.contains(&name);
                if let Some(table) = table
                    && is_ours(name)
                {
                    self.chains.entry((table, name.to_owned())).or_default();
                }
            } else if let Some((chain, rule)) = rule(line) {
                self.rule(table, chain, rule);
            }
        }
    }

    fn rule(&mut self, table: Option<Table>, chain: &str, rule: &str) {
        match table {
            Some(table) if is_ours(chain) => {
                self.chains.entry((table, chain.to_owned())).or_default().push(rule.to_owned());
            }
            Some(table) if target(rule).is_some_and(|target| is_ours(&target)) => {
                self.jumps.push((table, format!("{chain} {rule}")));
            }
            _ => self.others += 1,
        }
    }

    /// Nothing of ours is here.
    pub(super) fn is_clean(&self) -> bool {
        self.chains.is_empty() && self.jumps.is_empty()
    }

    pub(super) fn names(&self) -> BTreeSet<ChainName> {
        self.chains.keys().cloned().collect()
    }

    /// Without this chain of the filter table, and what leads there: it is to stay. Whether it was there.
    pub(super) fn spare(&mut self, chain: &str) -> bool {
        let leads = format!("-j {chain}");
        self.jumps.retain(|(table, rule)| *table != Table::Filter || !rule.ends_with(&leads));
        self.chains.remove(&(Table::Filter, chain.to_owned())).is_some()
    }

    /// Matches by which pods of this node were told.
    pub(super) fn pod_devices(&self) -> BTreeSet<String> {
        let rules = self.chains.get(&(Table::Nat, MARK_OTHERS.to_owned()));
        rules.into_iter().flatten().filter_map(|rule| value(&words(rule), &["-i"])).collect()
    }

    /// What it was before an agent set it, as far as that is noted here.
    pub(super) fn route_localnet(&self) -> Option<i32> {
        let rules = self.chains.get(&(Table::Filter, LOOPBACK.to_owned()));
        rules.into_iter().flatten().find_map(|rule| loopback::noted(&value(&words(rule), &["--comment"])?))
    }

    /// What there is of these Services, as it stands; and their addresses that are guarded.
    pub(super) fn kept(&self, services: &BTreeSet<ServiceKey>) -> (BTreeMap<ServicePortName, Piece>, BTreeSet<IpAddr>) {
        let mut pieces: BTreeMap<ServicePortName, Piece> = BTreeMap::new();
        let mut guarded = BTreeSet::new();
        for tree in Tree::OF_FRONTENDS {
            for rule in self.reachable(tree) {
                let words = words(rule);
                if value(&words, &["-j"]).as_deref() == Some(GUARD) {
                    guarded.extend(address(&words));
                }
                let Some((name, frontend)) = named(&words) else { continue };
                if !services.contains(&name.service) {
                    continue;
                }
                let piece = pieces.entry(name).or_default();
                piece.entries.entry((tree, frontend)).or_default().push(rule.to_owned());
                self.follow(tree.table(), rule, piece);
            }
        }
        let addresses: BTreeSet<_> =
            pieces.values().flat_map(|piece| piece.entries.keys()).map(|(_, frontend)| frontend.addr).collect();
        guarded.retain(|addr| addresses.contains(addr));
        (pieces, guarded)
    }

    /// Frontends of Services other than these.
    pub(super) fn frontends(&self, held: &BTreeSet<ServiceKey>) -> BTreeSet<Frontend> {
        let rules = Tree::OF_FRONTENDS.into_iter().flat_map(|tree| self.reachable(tree));
        let named = rules.filter_map(|rule| named(&words(rule)));
        named.filter(|(name, _)| !held.contains(&name.service)).map(|(_, frontend)| frontend).collect()
    }

    /// The rules of a tree that are about frontends and addresses.
    fn reachable(&self, tree: Tree) -> Vec<&str> {
        let mut chains = vec![tree.top().to_owned()];
        let mut rules = Vec::new();
        // A tree is three chains deep at most, so this ends though somebody were to lead it in a circle.
        for _ in 0..3 {
            let mut inner = Vec::new();
            for rule in chains.drain(..).filter_map(|name| self.chains.get(&(tree.table(), name))).flatten() {
                match target(rule) {
                    Some(name) if is_block(&name) => inner.push(name),
                    _ => rules.push(rule.as_str()),
                }
            }
            chains = inner;
        }
        rules
    }

    /// The chains of a ServicePort that `rule` leads to, and its endpoints.
    fn follow(&self, table: Table, rule: &str, into: &mut Piece) {
        let Piece { chains, entries: _, hairpin } = into;
        let mut next = vec![rule.to_owned()];
        while let Some(rule) = next.pop() {
            let destination = value(&words(&rule), &["--to-destination"]);
            hairpin.extend(destination.and_then(|to| to.parse::<SocketAddr>().ok()).map(|to| to.ip()));
            let Some(name) = target(&rule).filter(|name| has_hash(name, &KINDS)) else { continue };
            let key = (table, name);
            if let Some(rules) = self.chains.get(&key)
                && !chains.contains_key(&key)
            {
                next.extend(rules.iter().cloned());
                chains.insert(key, rules.clone());
            }
        }
    }
}

/// `-A CHAIN RULE`, counters before it left out.
fn rule(line: &str) -> Option<(&str, &str)> {
    let line = match line.strip_prefix('[') {
        Some(counted) => counted.split_once("] ")?.1,
        None => line,
    };
    let rest = line.strip_prefix("-A ")?;
    Some(rest.split_once(' ').unwrap_or((rest, "")))
}

fn address(words: &[String]) -> Option<IpAddr> {
    value(words, &["-d"])?.split('/').next()?.parse().ok()
}

/// Whose rule this is, and for which frontend.
fn named(words: &[String]) -> Option<(ServicePortName, Frontend)> {
    let protocol = match value(words, &["-p"])?.as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return None,
    };
    let port: Port = value(words, &["--dport"])?.parse().ok()?;
    let comment = value(words, &["--comment"])?;
    let (namespace, name) = comment.split(' ').next()?.split_once('/')?;
    let (name, port_name) = name.split_once(':').unwrap_or((name, ""));
    let service = ServicePortName { service: ServiceKey::new(namespace, name), port: port_name.into(), protocol };
    Some((service, Frontend { addr: address(words)?, port, protocol }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SAVED: &str = r#"# Generated by iptables-save v1.8.9
*nat
:PREROUTING ACCEPT [12:720]
:PROXY-SERVICES - [0:0]
:PROXY-NET-0123456789ABCDEF - [0:0]
:PROXY-SVC-0000000000000001 - [0:0]
:PROXY-SEP-0000000000000002 - [0:0]
:PROXY-SVC-0000000000000003 - [0:0]
:PROXY-MARK-OTHERS - [0:0]
:PROXY-FIER - [0:0]
[4:240] -A PREROUTING -m comment --comment "Services" -j PROXY-SERVICES
-A PREROUTING -m comment --comment "not -j PROXY-SERVICES" -j PROXY-FIER
-A PROXY-SERVICES -d 10.96.0.0/20 -j PROXY-NET-0123456789ABCDEF
-A PROXY-NET-0123456789ABCDEF -d 10.96.0.10/32 -p udp -m comment --comment "kube-system/dns:dns ClusterIP" -m udp --dport 53 -j PROXY-SVC-0000000000000001
-A PROXY-NET-0123456789ABCDEF -d 10.96.0.11/32 -p tcp -m comment --comment "default/web ClusterIP" -m tcp --dport 80 -j PROXY-SVC-0000000000000003
-A PROXY-SVC-0000000000000001 -j PROXY-SEP-0000000000000002
-A PROXY-SEP-0000000000000002 -p udp -m udp -j DNAT --to-destination 10.244.1.2:53
-A PROXY-MARK-OTHERS -i cni0 -j RETURN
COMMIT
*filter
:INPUT ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:PROXY-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate INVALID,NEW,UNTRACKED -j PROXY-SERVICES
-A PROXY-SERVICES -d 10.96.0.10/32 -j PROXY-GUARD
-A PROXY-SERVICES -d 10.96.0.11/32 -j PROXY-GUARD
COMMIT
*security
:PROXY-SERVICES - [0:0]
-A INPUT -j PROXY-SERVICES
COMMIT
"#;

    fn saved() -> Saved {
        let mut saved = Saved::default();
        saved.parse(SAVED);
        saved
    }

    #[test]
    fn ours_is_told_from_others() {
        let saved = saved();
        let names: Vec<_> = saved.chains.keys().map(|(table, name)| format!("{} {name}", table.name())).collect();
        assert_eq!(
            names,
            [
                "nat PROXY-MARK-OTHERS",
                "nat PROXY-NET-0123456789ABCDEF",
                "nat PROXY-SEP-0000000000000002",
                "nat PROXY-SERVICES",
                "nat PROXY-SVC-0000000000000001",
                "nat PROXY-SVC-0000000000000003",
                "filter PROXY-SERVICES",
            ]
        );
        assert_eq!(
            saved.jumps,
            [
                (Table::Nat, "PREROUTING -m comment --comment \"Services\" -j PROXY-SERVICES".to_owned()),
                (Table::Filter, "INPUT -m conntrack --ctstate INVALID,NEW,UNTRACKED -j PROXY-SERVICES".to_owned()),
            ]
        );
        assert!(saved.kubelet && saved.others == 2, "{saved:?}");
        assert_eq!(saved.pod_devices(), BTreeSet::from(["cni0".to_owned()]));
    }

    #[test]
    fn what_is_kept_is_whole() {
        let (kept, guarded) = saved().kept(&BTreeSet::from([ServiceKey::new("kube-system", "dns")]));
        assert_eq!(kept.len(), 1);
        let (name, piece) = kept.first_key_value().unwrap();
        assert_eq!((name.to_string().as_str(), name.protocol), ("kube-system/dns:dns", Protocol::Udp));
        assert_eq!(piece.chains.len(), 2, "{piece:?}");
        assert_eq!(piece.entries.len(), 1);
        assert_eq!(piece.hairpin, BTreeSet::from(["10.244.1.2".parse().unwrap()]));
        assert_eq!(guarded, BTreeSet::from(["10.96.0.10".parse().unwrap()]));
        let held = BTreeSet::from([ServiceKey::new("default", "web")]);
        let frontends: Vec<_> = saved().frontends(&held).iter().map(ToString::to_string).collect();
        assert_eq!(frontends, ["10.96.0.10:53/UDP"]);
        assert_eq!(saved().frontends(&BTreeSet::new()).len(), 2);
    }

    proptest! {
        /// Whatever is in there, nothing of it breaks us, and nothing that is not ours is taken for ours.
        #[test]
        fn any_text_is_read(lines in proptest::collection::vec("(\\*(nat|filter)|:[A-Z-]{0,12} - \\[0:0\\]|(\\[[0-9:]{0,4}\\] )?-A [A-Z-]{0,12} .{0,40}|-A.{0,30}|COMMIT|.{0,40})", 0..40)) {
            let mut saved = Saved::default();
            saved.parse(&lines.join("\n"));
            prop_assert!(saved.chains.keys().all(|(_, name)| is_ours(name)));
            prop_assert!(saved.jumps.iter().all(|(_, rule)| rule.contains(PREFIX) || rule.contains(SCRATCH)));
            let _read = saved.kept(&BTreeSet::from([ServiceKey::new("a", "b")]));
        }

        /// Words survive being quoted.
        #[test]
        fn words_are_found_again(parts in proptest::collection::vec("[a-z \\\\\"-]{0,8}", 1..6)) {
            let quote = |word: &String| format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""));
            let text = parts.iter().map(quote).collect::<Vec<_>>().join(" ");
            prop_assert_eq!(words(&text), parts);
        }
    }
}
