//! Keeps the kernel's NAT on for connections that kube-proxy translated, once its rules are gone.
//!
//! Rules are for a connection's first packet; what follows is translated by its entry in conntrack, as long as somebody has NAT and
//! connection tracking on in this network namespace: the kernel switches them off with the last chain of type nat, and with the last rule
//! that asks conntrack (`nf_nat_unregister_fn`, `nf_ct_netns_put`). Where kube-proxy's were the last, the connections that it translated
//! would break. So `cleanup --kube-proxy` makes a table of its own before it removes them, and the agent removes that one when conntrack
//! translates none any more, by two looks.
//!
//! By netlink: the image that has no nft does it, too. What is left of a table of the nftables mode that is retired is made of the same.

use std::io;

use super::{
    conntrack::{
        CHAIN_HOOK, CHAIN_NAME, NESTED, NEW_TABLE, NFTABLES, RULE_CHAIN, RULE_EXPRESSIONS, Socket, Step, TABLE,
        TABLE_NAME, remove_table, string,
    },
    lock::Lock,
    remove_named, translated,
};
use crate::{
    dataplane::{
        DataplaneError, former,
        netlink::{NLM_F_CREATE, attribute},
    },
    model::Family,
};

/// In each family that has such connections.
const NAME: &str = "proxy-agent-nat";
const CHAIN: &str = "kept";
const COMMENT: &str = "keeps connections going that kube-proxy translated";

const NEW_CHAIN: u16 = NFTABLES | 3;
const NEW_RULE: u16 = NFTABLES | 6;
const DELETE_RULE: u16 = NFTABLES | 8;
/// `NF_INET_POST_ROUTING`, and the priority that source NAT has.
const POSTROUTING: u32 = 4;
const PRIORITY: u32 = 100;
/// `NFTA_RULE_USERDATA`, and a comment in it as nft writes them.
const RULE_NOTES: u16 = 7;
const OF_COMMENT: u8 = 0;
/// `NFT_REG_1`, `NFT_CT_STATUS`.
const REGISTER: u32 = 1;
const STATUS: u32 = 2;

/// Connections of this family that conntrack translates, whoever made them so.
pub fn translated(family: Family) -> io::Result<u64> {
    translated::of(family, |_| true)
}

/// Makes what keeps NAT on, or makes it anew; says what.
pub fn keep(family: Family) -> io::Result<String> {
    Socket::open()?.transact(family, &in_place_of(NAME, CHAIN, COMMENT))?;
    Ok(format!("table {} {NAME} (nftables)", super::ip(family)))
}

/// What is kept, by name.
pub fn remains() -> Result<Vec<String>, DataplaneError> {
    super::named(NAME)
}

/// With no agent at work here.
pub fn remove() -> Result<(), DataplaneError> {
    let _lock = Lock::take()?;
    remove_named(NAME)
}

/// A table with [`keeping`] in it and nothing else. One of this name goes in the same transaction, so that NAT is not off in between.
pub(crate) fn in_place_of(name: &str, chain: &str, comment: &str) -> Vec<Step> {
    let table = || Step { kind: NEW_TABLE, flags: NLM_F_CREATE, attributes: string(TABLE_NAME, name) };
    let [chain, rule] = keeping(name, chain, comment);
    vec![table(), remove_table(name), table(), chain, rule]
}

/// The same in the place of all rules of these chains, which are there; the rest of the table stays.
pub(crate) fn in_place_of_rules<'a>(
    name: &str,
    chains: impl Iterator<Item = &'a str>,
    chain: &str,
    comment: &str,
) -> Vec<Step> {
    let rules =
        |of| Step { kind: DELETE_RULE, flags: 0, attributes: [string(TABLE, name), string(RULE_CHAIN, of)].concat() };
    chains.map(rules).chain(keeping(name, chain, comment)).collect()
}

/// What keeps NAT on, and conntrack: a chain does the one, its rule the other.
fn keeping(table: &str, name: &str, comment: &str) -> [Step; 2] {
    let number = |kind, value: u32| attribute(kind, &value.to_be_bytes());
    let nested = |kind, parts: &[Vec<u8>]| attribute(kind | NESTED, &parts.concat());
    let [hook, policy, kind] = CHAIN_HOOK;
    let chain = [
        string(TABLE, table),
        string(CHAIN_NAME, name),
        nested(hook, &[number(1, POSTROUTING), number(2, PRIORITY)]),
        number(policy, libc::NF_ACCEPT as u32),
        string(kind, "nat"),
    ];
    // It asks for a connection's status, and does nothing with it.
    let asks = nested(1, &[string(1, "ct"), nested(2, &[number(1, REGISTER), number(2, STATUS)])]);
    let comment = [&[OF_COMMENT, comment.len() as u8 + 1], comment.as_bytes(), &[0]].concat();
    let rule = [
        string(TABLE, table),
        string(RULE_CHAIN, name),
        nested(RULE_EXPRESSIONS, &[asks]),
        attribute(RULE_NOTES, &comment),
    ];
    let new = |kind, parts: &[Vec<u8>]| Step { kind, flags: NLM_F_CREATE, attributes: parts.concat() };
    [new(NEW_CHAIN, &chain), new(NEW_RULE, &rule)]
}

/// What `cleanup --kube-proxy` made, at any time while the agent runs or before.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Whether it is waited for. Where netfilter serves, conntrack translates for that as well, and NAT is on for as long.
    pub(crate) waits: bool,
}

impl former::Former for Kept {
    fn name(&self) -> &'static str {
        "kube-proxy"
    }

    fn recurs(&self) -> bool {
        true
    }

    fn is_there(&mut self) -> Result<bool, DataplaneError> {
        Ok(!remains()?.is_empty())
    }

    /// kube-proxy's rules are gone.
    fn retire(&mut self) -> Result<(), DataplaneError> {
        Ok(())
    }

    fn flows(&mut self) -> Result<u64, DataplaneError> {
        if !self.waits {
            return Ok(0);
        }
        let counted = Family::BOTH.into_iter().map(translated).sum::<io::Result<u64>>();
        counted.map_err(translated::failed)
    }

    fn remove(&mut self) -> Result<(), DataplaneError> {
        remove_named(NAME)
    }
}

#[cfg(test)]
mod tests {
    use former::Former;

    use super::*;

    /// In a network namespace of this thread's own.
    #[test]
    fn it_is_made_and_goes() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP it_is_made_and_goes: not root");
            return;
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        assert_eq!(remains().unwrap(), Vec::<String>::new());
        let mut kept = Kept { waits: true };
        assert!(!kept.is_there().unwrap());
        remove_named(NAME).unwrap();
        for family in Family::BOTH {
            assert_eq!(translated(family).unwrap(), 0);
            // Once more is as once.
            for _ in 0..2 {
                assert_eq!(
                    keep(family).unwrap(),
                    format!("table {} proxy-agent-nat (nftables)", super::super::ip(family))
                );
            }
            let made = Socket::open().unwrap().structure(family, NAME).unwrap();
            let chains: Vec<_> = made.chains.iter().map(|(name, chain)| (name.as_str(), chain.rules)).collect();
            assert_eq!(chains, [(CHAIN, 1)]);
        }
        assert_eq!(remains().unwrap(), ["table ip proxy-agent-nat (nftables)", "table ip6 proxy-agent-nat (nftables)"]);
        assert!(kept.is_there().unwrap());
        assert_eq!(kept.flows().unwrap(), 0);
        kept.remove().unwrap();
        assert!(!kept.is_there().unwrap());
    }

    #[test]
    fn what_is_refused_is_said() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP what_is_refused_is_said: not root");
            return;
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let refused = Socket::open().unwrap().remove_table(Family::V4, "absent").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOENT));
        // All of it or nothing.
        let steps = [in_place_of(NAME, CHAIN, COMMENT), vec![remove_table("absent")]].concat();
        assert!(Socket::open().unwrap().transact(Family::V4, &steps).is_err());
        assert_eq!(remains().unwrap(), Vec::<String>::new());
    }
}
