//! What nftables left in force, where another mode takes over.

use super::{
    NFT, Nftables, Role,
    render::{Collection, Renderer},
};
use crate::{
    dataplane::{
        DataplaneError, former,
        netfilter::{
            Options,
            conntrack::{Socket, Structure},
            translated::Translated,
        },
        select::Mode,
    },
    desired::Frontend,
    model::Family,
};

/// All that is left of a table that is retired.
const RETIRED: &str = "retired";

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
        let mut text = String::new();
        for (family, ip) in Family::BOTH.into_iter().zip(["ip", "ip6"]) {
            let found = socket.structure(family, Role::Whole.table()).map_err(tables)?;
            if !found.chains.is_empty() && !is_retired(&found) {
                self.0.learn(frontends(&socket, family).map_err(tables)?);
                text.push_str(&retired(ip));
            }
        }
        if text.is_empty() {
            return Ok(());
        }
        NFT.run(&["-f", "-"], &text).map(drop).map_err(DataplaneError::from)
    }

    fn flows(&mut self) -> Result<u64, DataplaneError> {
        self.0.flows()
    }

    fn remove(&mut self) -> Result<(), DataplaneError> {
        Nftables::remove_tables(Role::Whole)
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

/// In one transaction, so that neither is off in between: the chain keeps translation on, its rule conntrack.
fn retired(ip: &str) -> String {
    let table = Role::Whole.table();
    format!(
        "add table {ip} {table}\ndelete table {ip} {table}\nadd table {ip} {table}\n\
         add chain {ip} {table} {RETIRED} {{ type nat hook postrouting priority 100; policy accept; }}\n\
         add rule {ip} {table} {RETIRED} ct status dnat accept\n"
    )
}
