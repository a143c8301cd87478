//! Another proxy's rules on this node: two proxies translate the same traffic, and leftovers of one that is gone capture it.

use std::{io, process::Command};

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
/// kube-proxy's table in nftables mode.
const NFT_TABLE: &str = "kube-proxy";

pub(super) fn look() -> Foreign {
    let mut found = Vec::new();
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

fn output(program: &str, args: &[&str]) -> io::Result<String> {
    let output = Command::new(program).args(args).output()?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let text = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(text.lines().next().unwrap_or("failed without a word").to_owned()))
    }
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
                if *name == NFT_TABLE {
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
    fn iptables_chains_are_found() {
        let text = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n";
        assert_eq!(in_iptables(text, "iptables").unwrap(), "chain KUBE-SERVICES in the nat table (iptables)");
        assert_eq!(in_iptables("*nat\n:KUBE-SERVICES-OLD - [0:0]\nCOMMIT\n", "iptables"), None);
    }
}
