//! What an agent left in the tables of iptables, of either flavour.
//!
//! A command that is not there, or may not read, is no proof that nothing is in force: then the kernel is asked which tables there are.

use std::{fs, io};

use super::{
    flavour::{Flavour, Tools},
    loopback::{self, RouteLocalnet},
    render::{LOOPBACK, Table},
    save::{Saved, is_ours},
    shadow,
};
use crate::{
    dataplane::{DataplaneError, netfilter::conntrack::Socket},
    model::Family,
};

/// Of one flavour and family.
pub(super) struct Left {
    pub(super) tools: Tools,
    pub(super) family: Family,
    pub(super) saved: Saved,
}

impl Left {
    pub(super) fn remove(self) -> Result<(), DataplaneError> {
        self.remove_with(&loopback::here())
    }

    pub(super) fn remove_with(mut self, setting: &RouteLocalnet) -> Result<(), DataplaneError> {
        // The rules go last: one of them keeps out what the setting lets in. It alone stays as long as that stands.
        let put_back = setting.put_back(self.saved.route_localnet());
        if put_back.is_err() {
            self.saved.spare(LOOPBACK);
        }
        let removed = self.remove_rules();
        put_back.and(removed)
    }

    /// Where others of ours go on with the setting.
    pub(super) fn remove_rules(self) -> Result<(), DataplaneError> {
        let Self { tools, family, saved } = self;
        if saved.is_clean() {
            return Ok(());
        }
        tools.restore(family, &shadow::removal(saved.names(), saved.jumps)).map_err(DataplaneError::from)
    }
}

/// All that can be found, and why there may be more.
#[derive(Default)]
pub(super) struct Found {
    pub(super) left: Vec<Left>,
    pub(super) unknown: Option<DataplaneError>,
}

impl Found {
    /// Does something to each; the first thing that was in the way, which may be that there is more.
    pub(super) fn each(self, mut each: impl FnMut(Left) -> Result<(), DataplaneError>) -> Result<(), DataplaneError> {
        let mut result = Ok(());
        for left in self.left {
            result = result.and(each(left));
        }
        result.and(self.unknown.map_or(Ok(()), Err))
    }
}

pub(super) fn find() -> Found {
    let mut found = Found::default();
    for flavour in Flavour::ALL {
        match Tools::find(flavour) {
            Ok(tools) => found.look(tools),
            Err(error) => {
                let unread = Family::BOTH.into_iter().find(|family| may_hold(flavour, *family));
                found.unknown = found.unknown.or_else(|| unread.map(|family| unknown(flavour, family, &error)));
            }
        }
    }
    found
}

pub(super) fn of(tools: Tools) -> Found {
    let mut found = Found::default();
    found.look(tools);
    found
}

impl Found {
    fn look(&mut self, tools: Tools) {
        for family in Family::BOTH {
            match tools.save(family) {
                Ok(saved) if saved.is_clean() => {}
                Ok(saved) => self.left.push(Left { tools, family, saved }),
                Err(error) if may_hold(tools.flavour, family) => {
                    let missing = tools.are_allowed().err().map(|missing| format!("{error}; {missing}"));
                    let why = missing.unwrap_or_else(|| error.to_string());
                    self.unknown.get_or_insert_with(|| unknown(tools.flavour, family, &why));
                }
                Err(_) => {}
            }
        }
    }
}

fn unknown(flavour: Flavour, family: Family, why: &dyn std::fmt::Display) -> DataplaneError {
    DataplaneError::Unavailable(format!(
        "the tables of iptables ({flavour}, {family:?}) cannot be read, and may hold rules of ours: {why}"
    ))
}

/// Whether something of ours may be there, as far as the kernel says without the commands. Where it does not, something may.
fn may_hold(flavour: Flavour, family: Family) -> bool {
    match flavour {
        Flavour::Nft => nft_holds(family),
        Flavour::Legacy => {
            let file = if family == Family::V4 { "ip_tables_names" } else { "ip6_tables_names" };
            may_be_listed(fs::read_to_string(format!("/proc/thread-self/net/{file}")))
        }
    }
}

/// `names`: the legacy tables that there are. Whose rules are in them it does not say.
fn may_be_listed(names: io::Result<String>) -> bool {
    match names {
        Ok(names) => names.lines().any(|name| Table::ALL.into_iter().any(|table| table.name() == name)),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

fn nft_holds(family: Family) -> bool {
    let holds = |socket: &Socket| {
        let tables = socket.tables(family)?;
        for table in Table::ALL.into_iter().map(Table::name).filter(|name| tables.iter().any(|table| table == name)) {
            if socket.structure(family, table)?.chains.keys().any(|chain| is_ours(chain)) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    match Socket::open().and_then(|socket| holds(&socket)) {
        Ok(holds) => holds,
        // No nftables in this kernel, or not for this family.
        Err(error) => ![libc::EINVAL, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT]
            .into_iter()
            .any(|code| error.raw_os_error() == Some(code)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_asked_may_be_there() {
        assert!(may_be_listed(Ok("filter\nnat\n".into())));
        assert!(!may_be_listed(Ok("raw\n".into())) && !may_be_listed(Ok(String::new())));
        assert!(!may_be_listed(Err(io::ErrorKind::NotFound.into())), "no such tables in this kernel");
        assert!(may_be_listed(Err(io::ErrorKind::PermissionDenied.into())));
    }

    #[test]
    fn what_is_not_known_is_said_though_the_rest_goes() {
        let unknown = || Some(unknown(Flavour::Legacy, Family::V4, &"CAP_NET_RAW is missing"));
        let none = |_: Left| Ok(());
        assert!(Found::default().each(none).is_ok());
        let said = Found { unknown: unknown(), ..Found::default() }.each(none).unwrap_err().to_string();
        assert!(said.contains("legacy") && said.contains("CAP_NET_RAW"), "{said}");
        let left = Left { tools: Tools::fake(["true"; 3]), family: Family::V4, saved: Saved::default() };
        let mut seen = 0;
        let found = Found { left: vec![left], unknown: unknown() };
        let result = found.each(|_| {
            seen += 1;
            Ok(())
        });
        assert!(result.is_err() && seen == 1);
    }
}
