//! Chains that drop what is forwarded unless a rule accepts it, as docker and ufw leave `FORWARD`. kube-proxy in iptables mode marks what it
//! masquerades, and accepts what is marked and what is under way (`KUBE-FORWARD`, contract A76); of ours that mode alone does so.

use std::fs;

use super::foreign::output;

/// Each by its name. None where no tool is there that knows: that is said of other proxies' rules already.
pub(super) fn look() -> Vec<String> {
    let mut found = output("nft", &["list", "chains"]).map(|text| in_nft(&text)).unwrap_or_default();
    // Asking for a table that is not there would make it.
    let legacy = fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    if legacy.lines().any(|table| table == "filter") {
        let text = output("iptables-legacy-save", &["-t", "filter"]).unwrap_or_default();
        found.extend(
            text.lines()
                .any(|line| line.starts_with(":FORWARD DROP "))
                .then(|| "chain FORWARD (legacy iptables)".to_owned()),
        );
    }
    found
}

/// In the text of `nft list chains`.
fn in_nft(text: &str) -> Vec<String> {
    let (mut found, mut table, mut chain) = (Vec::new(), "", "");
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["table", ..] => table = line.trim_end_matches(" {"),
            ["chain", name, ..] => chain = name,
            ["type", "filter", "hook", "forward", .., "policy", "drop;"] => {
                found.push(format!("chain {chain} in {table}"));
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_drop_what_is_forwarded_are_found() {
        let text = "table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n\tchain FORWARD {\n\t\t\
                    type filter hook forward priority filter; policy drop;\n\t}\n}\ntable inet mine {\n\tchain fwd {\n\t\ttype filter hook forward \
                    priority filter + 10; policy drop;\n\t}\n\tchain open {\n\t\ttype filter hook forward priority 0; policy accept;\n\t}\n}\n";
        assert_eq!(in_nft(text), ["chain FORWARD in table ip filter", "chain fwd in table inet mine"]);
        assert!(in_nft("").is_empty());
    }
}
