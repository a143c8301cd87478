//! What iptables left in force, where another mode takes over.

use std::collections::BTreeSet;

use super::{
    left::{self, Left},
    render::{FORWARD, LOOPBACK, Table},
    save::{RETIRED, Saved},
    shadow,
};
use crate::dataplane::{DataplaneError, former, netfilter::translated::Translated, select::Mode};

/// By whom flows are counted that have to be waited for.
#[derive(Debug)]
pub(crate) struct Former(pub(crate) Translated);

impl former::Former for Former {
    fn name(&self) -> &'static str {
        Mode::Iptables.name()
    }

    fn is_there(&mut self) -> Result<bool, DataplaneError> {
        let left::Found { left, unknown } = left::find();
        // What there is goes all the same, and the rest is named with it.
        if left.is_empty() { unknown.map_or(Ok(false), Err) } else { Ok(true) }
    }

    fn retire(&mut self) -> Result<(), DataplaneError> {
        let found = left::find();
        if !self.0.lasts() {
            return found.each(Left::remove);
        }
        found.each(|Left { tools, family, saved }| {
            self.0.learn(saved.frontends(&BTreeSet::new()));
            retired(saved).map_or(Ok(()), |text| tools.restore(family, &text).map_err(DataplaneError::from))
        })
    }

    fn flows(&mut self) -> Result<u64, DataplaneError> {
        self.0.flows()
    }

    fn remove(&mut self) -> Result<(), DataplaneError> {
        left::find().each(Left::remove)
    }
}

/// What stays: a chain that nothing leads to, whose table keeps translation on, its rule conntrack; and the leave for what is translated to
/// be forwarded (A76), or a firewall that forwards nothing would end it; and what keeps the neighbours from loopback, for answers to what was
/// translated there need `route_localnet` as long. `None`: it is all there is.
fn retired(mut saved: Saved) -> Option<String> {
    let forwards = saved.spare(FORWARD);
    saved.spare(LOOPBACK);
    let (mut names, jumps) = (saved.names(), saved.jumps);
    names.remove(&(Table::Nat, RETIRED.to_owned()));
    if names.is_empty() && jumps.is_empty() {
        return None;
    }
    // First, so that conntrack is not off in between.
    let mut text = format!("*nat\n:{RETIRED} - [0:0]\n-A {RETIRED} -m conntrack --ctstate DNAT -j RETURN\nCOMMIT\n");
    if forwards {
        let goes_on = "-m conntrack --ctstate RELATED,ESTABLISHED -m conntrack --ctstate DNAT -j ACCEPT";
        text += &format!("*filter\n:{FORWARD} - [0:0]\n-A {FORWARD} {goes_on}\nCOMMIT\n");
    }
    Some(text + &shadow::removal(names, jumps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_chain_stays_and_once_is_enough() {
        let mut saved = Saved::default();
        saved.parse(
            "*nat\n:PROXY-SERVICES - [0:0]\n-A PREROUTING -j PROXY-SERVICES\nCOMMIT\n*filter\n:PROXY-FORWARD - [0:0]\n\
             :PROXY-INVALID - [0:0]\n:PROXY-LOOPBACK - [0:0]\n-A INPUT -j PROXY-LOOPBACK\n-A FORWARD -j PROXY-FORWARD\n-A INPUT -j PROXY-INVALID\n-A PROXY-FORWARD -j PROXY-INVALID\nCOMMIT\n",
        );
        let text = retired(saved).unwrap();
        let (stay, gone) = text.split_at(text.match_indices("COMMIT").nth(1).unwrap().0);
        assert!(stay.contains(":PROXY-RETIRED") && stay.contains("-A PROXY-RETIRED -m conntrack"), "{text}");
        assert!(stay.contains(":PROXY-FORWARD") && stay.contains("-A PROXY-FORWARD -m conntrack"), "{text}");
        for words in ["-X PROXY-SERVICES", "-X PROXY-INVALID", "-D PREROUTING -j PROXY-SERVICES", "-D INPUT"] {
            assert!(gone.contains(words), "{words}: {text}");
        }
        assert!(!gone.contains("PROXY-FORWARD") && !text.contains("PROXY-LOOPBACK"), "{text}");
        let mut saved = Saved::default();
        saved.parse(&format!("{stay}-A FORWARD -m comment --comment \"forwarding for Services\" -j PROXY-FORWARD\n"));
        assert_eq!((saved.chains.len(), saved.jumps.len()), (2, 1), "it is ours, and found again");
        assert_eq!(retired(saved), None);
    }
}
