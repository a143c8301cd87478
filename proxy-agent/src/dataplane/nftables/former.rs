//! What nftables left in force, where another mode takes over. By netlink: the image of eBPF mode has no nft.

use super::{
    Nftables, Role,
    render::{Collection, Renderer},
};
use crate::{
    dataplane::{
        DataplaneError, former,
        netfilter::{
            Options,
            conntrack::{Socket, Structure},
            nat,
            translated::Translated,
        },
        select::Mode,
    },
    desired::Frontend,
    model::Family,
};

/// All that is left of a table that is retired.
const RETIRED: &str = "retired";
const COMMENT: &str = "keeps connections going that nftables mode translated";
const OF_IPVS: &str = "keeps connections going that IPVS translated";
/// What IPVS' table guards the node's own sockets with; IPVS takes what is for its servers before.
const OF_INPUT: &str = "guard-input";

/// By whom flows are counted that have to be waited for.
#[derive(Debug)]
pub(crate) struct Former(pub(crate) Translated);

impl former::Former for Former {
    fn name(&self) -> &'static str {
        Mode::Nftables.name()
    }

    fn is_there(&mut self) -> Result<bool, DataplaneError> {
        Ok(!Nftables::remains()?.is_empty())
    }

    fn retire(&mut self) -> Result<(), DataplaneError> {
        if !self.0.lasts() {
            return Nftables::remove_tables(Role::Whole);
        }
        let socket = Socket::open().map_err(tables)?;
        for family in Family::BOTH {
            let found = socket.structure(family, Role::Whole.table()).map_err(tables)?;
            if !found.chains.is_empty() && !is_retired(&found) {
                self.0.learn(frontends(&socket, family).map_err(tables)?);
                let steps = nat::in_place_of(Role::Whole.table(), RETIRED, COMMENT);
                socket.transact(family, &steps).map_err(tables)?;
            }
        }
        Ok(())
    }

    fn flows(&mut self) -> Result<u64, DataplaneError> {
        self.0.flows()
    }

    fn remove(&mut self) -> Result<(), DataplaneError> {
        Nftables::remove_tables(Role::Whole)
    }
}

impl Nftables {
    /// Takes the rules of IPVS' table out of force. What is noted in its sets stays, translation of what is open, and what keeps the node's own
    /// sockets from being asked at addresses that it holds for as long as there is something open; who serves now guards some of them only.
    pub(crate) fn retire_gate() -> Result<(), DataplaneError> {
        let socket = Socket::open().map_err(tables)?;
        for family in Family::BOTH {
            let found = socket.structure(family, Role::Gate.table()).map_err(tables)?;
            if !found.chains.is_empty() {
                let gate = Renderer::new(family, Role::Gate, &Options::default()).skeleton();
                let hooked = gate.iter().filter(|(name, hook, _)| hook.is_some() && *name != OF_INPUT);
                let there = hooked.map(|(name, ..)| *name).filter(|name| found.chains.contains_key(*name));
                let steps = nat::in_place_of_rules(Role::Gate.table(), there, "postrouting", OF_IPVS);
                socket.transact(family, &steps).map_err(tables)?;
            }
        }
        Ok(())
    }
}

/// That the table translates for.
fn frontends(socket: &Socket, family: Family) -> std::io::Result<Vec<Frontend>> {
    let renderer = Renderer::new(family, Role::Whole, &Options::default());
    let mut found = Vec::new();
    for collection in [Collection::Frontends, Collection::NodeFrontends] {
        socket.keys(family, Role::Whole.table(), collection.name(), |key| found.extend(renderer.frontend_of(key)))?;
    }
    Ok(found)
}

fn tables(source: std::io::Error) -> DataplaneError {
    DataplaneError::Kernel { what: "the tables of nftables".into(), source }
}

fn is_retired(found: &Structure) -> bool {
    found.sets.is_empty() && found.chains.keys().eq([RETIRED])
}

#[cfg(test)]
mod tests {
    use super::{
        super::shadow::{Found, Item, Shadow},
        *,
    };
    use crate::dataplane::{
        former::{Former as _, Known},
        netfilter::refused::{frontend, spec},
        nftables::{NFT, Servers},
    };

    /// In a network namespace of this thread's own.
    #[test]
    fn a_table_is_retired_once_and_nothing_else_is_touched() {
        if !rustix::process::geteuid().is_root() || NFT.run(&["--version"], "").is_err() {
            println!("SKIP a_table_is_retired_once_and_nothing_else_is_touched: not root, or no nft");
            return;
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let [web, six] = ["10.96.0.1", "fd00:96::1"].map(frontend);
        let mut text = "table ip other {\n chain retired {\n }\n}\n".to_owned();
        for (family, frontend) in Family::BOTH.into_iter().zip([web, six]) {
            let shadow = Shadow::new(Renderer::new(family, Role::Whole, &Options::default()));
            let draft = shadow.draft(&[Item::Frontend(frontend, Some(spec(&frontend)))]);
            text += &shadow.refill(&draft, &Found::default(), true);
        }
        NFT.run(&["-f", "-"], &text).unwrap();
        let known = Known::default();
        let mut former = Former(Translated::new(Some(known.clone())));
        assert!(former.is_there().unwrap());
        let socket = Socket::open().unwrap();
        // The second time there is nothing to do.
        let generations = [(); 2].map(|()| {
            former.retire().unwrap();
            socket.generation().unwrap()
        });
        assert_eq!(generations[0], generations[1]);
        for family in Family::BOTH {
            let left = socket.structure(family, Role::Whole.table()).unwrap();
            assert!(is_retired(&left) && left.chains[RETIRED].rules == 1, "{left:?}");
        }
        assert_eq!(*known.lock().unwrap(), [web, six].into(), "whose flows are waited for");
        former.remove().unwrap();
        assert!(!former.is_there().unwrap());
        assert_eq!(socket.tables(Family::V4).unwrap(), ["other"]);
        // What is gone already is no error.
        former.remove().unwrap();
    }

    #[test]
    fn a_gate_that_is_retired_guards_the_node_and_leads_nobody() {
        if !rustix::process::geteuid().is_root() || NFT.run(&["--version"], "").is_err() {
            println!("SKIP a_gate_that_is_retired_guards_the_node_and_leads_nobody: not root, or no nft");
            return;
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        Nftables::retire_gate().unwrap();
        let shadow = Shadow::new(Renderer::new(Family::V4, Role::Gate, &Options::default()));
        let web = frontend("10.96.0.1");
        let noted = Servers { at: [Nftables::key(&web)].into(), marks: [7].into() };
        let draft = shadow.draft(&[Item::Frontend(web, Some(spec(&web))), Item::servers(noted.clone())]);
        NFT.run(&["-f", "-"], &shadow.refill(&draft, &Found::default(), true)).unwrap();
        for _ in 0..2 {
            Nftables::retire_gate().unwrap();
            let left = Socket::open().unwrap().structure(Family::V4, Role::Gate.table()).unwrap();
            let with_rules = left.chains.iter().filter(|(_, chain)| chain.rules > 0);
            assert_eq!(
                with_rules.map(|(name, chain)| (name.as_str(), chain.rules)).collect::<Vec<_>>(),
                [("guard", 4), ("guard-input", 1), ("postrouting", 1), ("refuse", 1)]
            );
            assert_eq!(Nftables::noted_by(Role::Gate, &Options::default()).unwrap()[0], (Family::V4, noted.clone()));
        }
        assert_eq!(Nftables::remains_of(Role::Gate).unwrap().len(), 1, "none of the other family");
    }
}
