//! Whether what we wrote is still there: others flush tables, and put rules before ours. Written here: nothing.
//!
//! A chain of ours in each table that has a rule as long as nobody flushed it, and the rules that lead packets to us; then what each of our chains
//! says, unless others change theirs over and over.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketType};

use super::{
    Half, State,
    flavour::Tools,
    render::{CANARY, ChainName, Table},
    save::Saved,
};
use crate::{
    dataplane::{
        Hook,
        netfilter::{names, tool::ToolError},
    },
    desired::Devices,
    model::Family,
};

const fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}

/// Names of what is not as it was left. `compare`: rules are read, too, and how long that took is added.
pub(super) fn lost(tools: &Tools, half: &mut Half, compare: Option<&mut Duration>) -> Result<Vec<String>, ToolError> {
    let family = half.shadow.renderer.family;
    let name = |table: Table, chain: &str| format!("iptables/{chain} {} {}", table.name(), word(family));
    let jumps = half.jumps();
    if jumps.is_empty() {
        // What is not known to be there is lost to nobody.
        return Ok(Vec::new());
    }
    let mut lost = Vec::new();
    let canaries = if half.state == State::Filled { &Table::ALL[..] } else { &[] };
    for table in canaries {
        if !tools.list(family, table.name(), CANARY)?.is_some_and(|printed| has_rule(&printed)) {
            lost.push(name(*table, CANARY));
        }
    }
    let mut wanted: BTreeMap<(Table, &str), Vec<String>> = BTreeMap::new();
    for (table, chain, rule) in jumps {
        wanted.entry((table, chain)).or_default().push(rule);
    }
    for ((table, chain), rules) in wanted {
        let printed = tools.list(family, table.name(), chain)?.unwrap_or_default();
        if !rules.iter().all(|rule| leads(&printed, rule)) {
            lost.push(name(table, chain));
        }
    }
    if let Some(took) = compare
        && lost.is_empty()
    {
        let start = Instant::now();
        let saved = tools.save(family)?;
        lost.extend(differences(half, &saved).into_iter().map(|(table, chain)| name(table, &chain)));
        *took += start.elapsed();
    }
    Ok(lost)
}

/// Chains that do not say what they were given. A rule may be printed in other words than it was written in: what it is printed as the first
/// time that it is seen is what it is to be from then on.
pub(super) fn differences(half: &mut Half, saved: &Saved) -> Vec<ChainName> {
    let chains = half.chains();
    let mut different: Vec<ChainName> =
        saved.chains.keys().filter(|chain| !chains.contains_key(*chain)).cloned().collect();
    for (chain, rules) in chains {
        let there = saved.chains.get(&chain).filter(|there| there.len() == rules.len());
        let as_written = there.is_some_and(|there| {
            let print = names::hash(there.iter().map(String::as_str));
            if *there == rules {
                half.prints.insert(chain.clone(), print);
            }
            *half.prints.entry(chain.clone()).or_insert(print) == print
        });
        if !as_written {
            different.push(chain);
        }
    }
    different
}

fn has_rule(printed: &str) -> bool {
    printed.lines().any(|line| line.starts_with("-A "))
}

/// Whether a rule leads where this one does. The rest of it may be printed in other words.
fn leads(printed: &str, rule: &str) -> bool {
    let target = |rule: &str| rule.rsplit_once(" -j ").map(|(_, target)| target.to_owned());
    let wanted = target(rule);
    printed.lines().any(|line| line.starts_with("-A ") && target(line) == wanted)
}

pub(super) fn hooks(half: &Half) -> Vec<Hook> {
    let renderer = &half.shadow.renderer;
    let hook = |(table, chain, rule): (Table, &str, String)| Hook {
        kind: format!("iptables/{chain}"),
        target: format!("{} {}", table.name(), word(renderer.family)),
        program: rule.rsplit_once(" -j ").map(|(_, target)| target.to_owned()).unwrap_or_default(),
    };
    renderer.jumps().into_iter().map(hook).collect()
}

/// Of devices that packets come in by: a bridge is not among those that are hooked.
pub(super) fn names(devices: &Devices, indices: &BTreeSet<u32>) -> BTreeSet<String> {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok();
    let ask = |index: &u32| rustix::net::netdevice::index_to_name(socket.as_ref()?, *index).ok();
    // One that is gone by now lets nothing in.
    indices
        .iter()
        .filter_map(|index| devices.get(index).map(|device| device.name.clone()).or_else(|| ask(index)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flushed_chain_is_told_from_one_that_is_as_it_was() {
        assert!(has_rule("-N PROXY-CANARY\n-A PROXY-CANARY -j RETURN\n"));
        assert!(!has_rule("-N PROXY-CANARY\n"));
        let rule = "-m comment --comment \"Services\" -j PROXY-SERVICES";
        assert!(leads("-P OUTPUT ACCEPT\n-A OUTPUT -m comment --comment Services -j PROXY-SERVICES\n", rule));
        assert!(!leads("-P OUTPUT ACCEPT\n-A OUTPUT -j PROXY-SERVICES-OF-OTHERS\n", rule));
    }
}
