//! Another proxy's rules on this node: two proxies translate the same traffic, and leftovers of one that is gone capture it.

use std::{fs, io, path::Path, process::Command};

use super::super::cleanup::kube_proxy;

/// What was found, or why nobody could look.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Foreign {
    None,
    /// Each a place, for example `table ip kube-proxy (nftables)`.
    Found(Vec<String>),
    Unknown(String),
}

/// kube-proxy's chains in iptables; one is enough, the others hang off it.
const IPTABLES_CHAIN: &str = "KUBE-SERVICES";
/// Devices that a proxy makes for itself, and whose they are.
const DEVICES: [(&str, &str); 5] = [
    (kube_proxy::DEVICE, "kube-proxy in IPVS mode"),
    ("kube-dummy-if", "kube-router's service proxy"),
    ("cilium_host", "Cilium"),
    ("bpfin.cali", "Calico's eBPF dataplane"),
    ("bpfout.cali", "Calico's eBPF dataplane"),
];
/// Where other proxies pin their maps, and what the names of those begin with.
const PINS: &str = "/sys/fs/bpf/tc/globals";
const PINNED: [(&str, &str); 2] = [("cilium_lb", "Cilium"), ("cali_v", "Calico's eBPF dataplane")];

pub(super) fn look() -> Foreign {
    let mut found = in_devices(&fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default());
    found.extend(in_pins(Path::new(PINS)));
    let mut reasons = Vec::new();
    // `nft` also sees what iptables wrote through its nft variant.
    match output("nft", &["list", "chains"]) {
        Ok(text) => found.extend(in_nft(&text)),
        Err(nft) => match output("iptables-save", &["-t", "nat"]) {
            Ok(text) => found.extend(in_iptables(&text, "iptables")),
            Err(iptables) => reasons.push(format!("nft: {nft}; iptables-save: {iptables}")),
        },
    }
    // Without the legacy tables in the kernel, asking for them would load their module.
    let legacy = std::fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    if legacy.lines().any(|table| table == "nat") {
        match output("iptables-legacy-save", &["-t", "nat"]) {
            Ok(text) => found.extend(in_iptables(&text, "legacy iptables")),
            Err(error) => reasons.push(format!("iptables-legacy-save: {error}")),
        }
    }
    if !found.is_empty() {
        Foreign::Found(found)
    } else if reasons.is_empty() {
        Foreign::None
    } else {
        Foreign::Unknown(reasons.join("; "))
    }
}

pub(super) fn output(program: &str, args: &[&str]) -> io::Result<String> {
    let output = Command::new(program).args(args).output()?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let text = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(text.lines().next().unwrap_or("failed without a word").to_owned()))
    }
}

/// In the text of `/proc/net/dev`.
fn in_devices(text: &str) -> Vec<String> {
    let names: Vec<&str> =
        text.lines().filter_map(|line| line.trim_start().split_once(':')).map(|(name, _)| name).collect();
    let there = DEVICES.iter().filter(|(name, _)| names.contains(name));
    there.map(|(name, whose)| format!("device {name} ({whose})")).collect()
}

/// One for each proxy is enough. A directory that cannot be read tells nothing.
fn in_pins(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let first = |(prefix, whose): &(&str, &str)| {
        let name = names.iter().find(|name| name.starts_with(prefix))?;
        Some(format!("map {}/{name} ({whose})", dir.display()))
    };
    PINNED.iter().filter_map(first).collect()
}

/// In the text of `nft list chains`.
fn in_nft(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut table = "";
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["table", family, name, ..] => {
                table = line.trim_end_matches(" {");
                if *name == kube_proxy::TABLE {
                    found.push(format!("table {family} {name} (kube-proxy in nftables mode)"));
                }
            }
            ["chain", IPTABLES_CHAIN, ..] => {
                found.push(format!("chain {IPTABLES_CHAIN} in {table} (kube-proxy in iptables mode)"))
            }
            _ => {}
        }
    }
    found
}

/// In the text of `iptables-save -t nat`.
fn in_iptables(text: &str, kind: &str) -> Option<String> {
    text.lines()
        .any(|line| line.strip_prefix(':').is_some_and(|rest| rest.split(' ').next() == Some(IPTABLES_CHAIN)))
        .then(|| format!("chain {IPTABLES_CHAIN} in the nat table ({kind})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nftables_of_both_modes_are_found() {
        let text = "table ip nat {\n\tchain KUBE-SERVICES {\n\t}\n\tchain PREROUTING {\n\t\ttype nat hook prerouting priority \
                    dstnat; policy accept;\n\t}\n}\ntable ip6 kube-proxy {\n\tchain services {\n\t}\n}\n";
        assert_eq!(
            in_nft(text),
            [
                "chain KUBE-SERVICES in table ip nat (kube-proxy in iptables mode)",
                "table ip6 kube-proxy (kube-proxy in nftables mode)"
            ]
        );
        assert!(in_nft("table inet filter {\n\tchain input {\n\t}\n}\n").is_empty());
        assert!(in_nft("").is_empty());
    }

    #[test]
    fn devices_and_pins_tell_of_others() {
        let text =
            "Inter-| Receive\n face |bytes\n    lo: 1 2\n  kube-ipvs0: 0 0\ncilium_host: 0 0\n cilium_hostel: 0 0\n";
        assert_eq!(in_devices(text), ["device kube-ipvs0 (kube-proxy in IPVS mode)", "device cilium_host (Cilium)"]);
        let dir = tempfile::tempdir().unwrap();
        assert!(in_pins(&dir.path().join("none")).is_empty());
        for name in ["cilium_lb4_services_v2", "cilium_lb4_backends_v3", "cilium_calls", "cali_v4_nat_fe3"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let found = in_pins(dir.path());
        assert!(found[0].ends_with("/cilium_lb4_backends_v3 (Cilium)"), "{found:?}");
        assert!(found.len() == 2 && found[1].ends_with("/cali_v4_nat_fe3 (Calico's eBPF dataplane)"), "{found:?}");
    }

    #[test]
    fn iptables_chains_are_found() {
        let text = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n";
        assert_eq!(in_iptables(text, "iptables").unwrap(), "chain KUBE-SERVICES in the nat table (iptables)");
        assert_eq!(in_iptables("*nat\n:KUBE-SERVICES-OLD - [0:0]\nCOMMIT\n", "iptables"), None);
    }
}
