//! Which iptables: the one that writes the kernel's old tables, or the one that writes nftables under the old names. A node has often both,
//! and what the one writes the other does not see. So we use the one that others use.

use std::{fmt, str::FromStr, time::Duration};

use super::save::Saved;
use crate::{
    dataplane::{
        DataplaneError,
        netfilter::{
            sample,
            tool::{Tool, ToolError},
        },
    },
    model::Family,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flavour {
    Nft,
    Legacy,
}

impl Flavour {
    pub const ALL: [Self; 2] = [Self::Nft, Self::Legacy];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }

    /// By what `--version` prints.
    fn of_version(text: &str) -> Self {
        if text.contains("(nf_tables)") { Self::Nft } else { Self::Legacy }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Flavour {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|flavour| flavour.name() == text);
        known.ok_or_else(|| format!("{text:?} is no flavour of iptables; they are nft and legacy"))
    }
}

/// The oldest that knows all that is asked of it: `--random-fully`, and `-w` of iptables-restore.
const OLDEST: (u32, u32, u32) = (1, 6, 2);
/// From here on it looks for the lock often enough by itself.
const LOOKS_OFTEN: (u32, u32, u32) = (1, 8, 9);
/// Seconds to wait for whoever holds the lock.
const LOCK: &str = "5";

const REMEDY: &str = "install the package iptables, or choose another --proxy-mode";
/// Legacy tables are written whole, which takes a while if they are long.
const PATIENCE: Duration = Duration::from_secs(120);

/// `iptables`, `iptables-restore`, `iptables-save` of each family.
type Programs = [[&'static str; 3]; 2];

const NFT: Programs = [
    ["iptables-nft", "iptables-nft-restore", "iptables-nft-save"],
    ["ip6tables-nft", "ip6tables-nft-restore", "ip6tables-nft-save"],
];
const LEGACY: Programs = [
    ["iptables-legacy", "iptables-legacy-restore", "iptables-legacy-save"],
    ["ip6tables-legacy", "ip6tables-legacy-restore", "ip6tables-legacy-save"],
];
/// Where there is one only.
const PLAIN: Programs =
    [["iptables", "iptables-restore", "iptables-save"], ["ip6tables", "ip6tables-restore", "ip6tables-save"]];

/// The commands of one flavour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tools {
    pub(super) flavour: Flavour,
    programs: Programs,
    version: (u32, u32, u32),
}

const fn tool(program: &'static str) -> Tool {
    Tool { program, remedy: REMEDY, patience: PATIENCE }
}

impl Tools {
    /// Of both families.
    #[cfg(test)]
    pub(super) const fn fake(programs: [&'static str; 3]) -> Self {
        Self { flavour: Flavour::Nft, programs: [programs, programs], version: LOOKS_OFTEN }
    }

    /// To ask the kernel.
    pub(super) fn are_allowed(&self) -> Result<(), DataplaneError> {
        if self.flavour == Flavour::Legacy { sample::net_raw() } else { Ok(()) }
    }

    fn of(&self, family: Family) -> [Tool; 3] {
        let [v4, v6] = self.programs;
        (if family == Family::V4 { v4 } else { v6 }).map(tool)
    }

    /// Writes `text`: each table of it in one piece, and nothing else of it is touched.
    pub(super) fn restore(&self, family: Family, text: &str) -> Result<(), ToolError> {
        self.restore_with(family, text, &[])
    }

    /// Only reads it.
    pub(super) fn test(&self, family: Family, text: &str) -> Result<(), ToolError> {
        self.restore_with(family, text, &["--test"])
    }

    fn restore_with(&self, family: Family, text: &str, further: &[&'static str]) -> Result<(), ToolError> {
        let [_, restore, _] = self.of(family);
        let mut args = vec!["-w", LOCK];
        args.extend(further);
        if self.flavour == Flavour::Legacy && self.version < LOOKS_OFTEN {
            args.extend(["-W", "100000"]);
        }
        args.extend(["--noflush", "--counters"]);
        restore.run(&args, text).map(drop)
    }

    pub(super) fn save(&self, family: Family) -> Result<Saved, ToolError> {
        let [_, _, save] = self.of(family);
        let mut saved = Saved::default();
        saved.parse(&save.run(&[], "")?);
        Ok(saved)
    }

    /// One chain, as `-S` prints it; `None`: there is no such chain.
    pub(super) fn list(&self, family: Family, table: &str, chain: &str) -> Result<Option<String>, ToolError> {
        let [list, _, _] = self.of(family);
        match list.run(&["-w", LOCK, "-t", table, "-S", chain], "") {
            Ok(printed) => Ok(Some(printed)),
            Err(error) if is_busy(&error) || !error.is_refusal() => Err(error),
            Err(_) => Ok(None),
        }
    }

    pub(super) fn find(flavour: Flavour) -> Result<Self, ToolError> {
        let own = match flavour {
            Flavour::Nft => NFT,
            Flavour::Legacy => LEGACY,
        };
        let mut failed = None;
        for programs in [own, PLAIN] {
            let [[list, _, _], _] = programs;
            match tool(list).run(&["--version"], "") {
                Ok(printed) if Flavour::of_version(&printed) == flavour => {
                    return Ok(Self { flavour, programs, version: version(&printed).unwrap_or_default() });
                }
                Ok(_) => {}
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        let [[program, ..], _] = own;
        Err(failed.unwrap_or(ToolError::Start { program, why: "not found".into(), remedy: REMEDY }))
    }
}

/// Somebody else is at work; it lies with nothing that was asked for.
pub(super) fn is_busy(error: &ToolError) -> bool {
    matches!(error, ToolError::Refused { said, .. } if said.contains("xtables lock") || said.contains("Resource temporarily unavailable"))
}

fn version(printed: &str) -> Option<(u32, u32, u32)> {
    let text = printed.split(' ').find_map(|word| word.strip_prefix('v'))?;
    let mut numbers = text.trim().split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or_default()))
}

/// What is used, and where else an earlier run left something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Chosen {
    pub(super) tools: Tools,
    pub(super) leftovers: Option<Tools>,
}

/// The flavours that are here, and whose rules they hold.
struct Candidate {
    tools: Tools,
    ours: bool,
    /// There may be more.
    unread: bool,
    kubelet: bool,
    others: usize,
}

/// As kube-proxy's image chooses: the kubelet's, else that with more rules in it, else what `iptables` is. Ours stays what it was, as long as
/// the others have none.
pub(super) fn choose(forced: Option<Flavour>) -> Result<Chosen, DataplaneError> {
    let mut candidates = Vec::new();
    let mut errors = Vec::new();
    for flavour in Flavour::ALL {
        match Tools::find(flavour) {
            Ok(tools) => candidates.push(look(tools)),
            Err(error) => errors.push((flavour, error)),
        }
    }
    let plain = tool(PLAIN[0][0]).run(&["--version"], "").ok().map(|printed| Flavour::of_version(&printed));
    let found = match forced {
        Some(forced) => candidates.iter().find(|candidate| candidate.tools.flavour == forced),
        None => best(&candidates, plain),
    };
    let Some(Candidate { tools, .. }) = found else {
        let error = errors.into_iter().find(|(flavour, _)| forced.is_none_or(|forced| forced == *flavour));
        return Err(error.map_or_else(|| DataplaneError::missing("no iptables", REMEDY), |(_, error)| error.into()));
    };
    if tools.version < OLDEST {
        let ((a, b, c), (x, y, z)) = (tools.version, OLDEST);
        return Err(DataplaneError::missing(
            format!("iptables is {a}.{b}.{c}, which is too old: it takes {x}.{y}.{z}"),
            REMEDY,
        ));
    }
    let leftovers =
        candidates.iter().find(|other| (other.ours || other.unread) && other.tools.flavour != tools.flavour);
    Ok(Chosen { tools: *tools, leftovers: leftovers.map(|other| other.tools) })
}

fn look(tools: Tools) -> Candidate {
    let read = Family::BOTH.map(|family| tools.save(family));
    let unread = read.iter().any(Result::is_err);
    // What cannot be read now has no part in the choice.
    let saved = read.map(Result::unwrap_or_default);
    Candidate {
        tools,
        unread,
        ours: saved.iter().any(|saved| !saved.is_clean()),
        kubelet: saved.iter().any(|saved| saved.kubelet),
        others: saved.iter().map(|saved| saved.others).sum(),
    }
}

fn best(candidates: &[Candidate], plain: Option<Flavour>) -> Option<&Candidate> {
    let rank = |one: &&Candidate| (one.kubelet, one.others, one.ours, Some(one.tools.flavour) == plain);
    candidates.iter().max_by_key(rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(flavour: Flavour, ours: bool, kubelet: bool, others: usize) -> Candidate {
        Candidate {
            tools: Tools { flavour, programs: PLAIN, version: (1, 8, 9) },
            ours,
            unread: false,
            kubelet,
            others,
        }
    }

    #[test]
    fn the_one_that_others_use_is_used() {
        use Flavour::{Legacy, Nft};
        let chosen = |nft: (bool, bool, usize), legacy: (bool, bool, usize), plain| {
            let candidates = [candidate(Nft, nft.0, nft.1, nft.2), candidate(Legacy, legacy.0, legacy.1, legacy.2)];
            best(&candidates, plain).unwrap().tools.flavour
        };
        assert_eq!(chosen((false, false, 9), (false, true, 1), Some(Nft)), Legacy, "the kubelet's");
        assert_eq!(chosen((false, false, 9), (true, false, 1), Some(Legacy)), Nft, "that of most rules");
        assert_eq!(chosen((false, false, 0), (true, false, 0), Some(Nft)), Legacy, "what it was");
        assert_eq!(chosen((false, false, 0), (false, false, 0), Some(Legacy)), Legacy, "the system's");
        assert!(best(&[], None).is_none());
    }

    #[test]
    fn versions_are_told() {
        assert_eq!(version("iptables v1.8.9 (nf_tables)\n"), Some((1, 8, 9)));
        assert_eq!(version("iptables v1.6.2\n"), Some((1, 6, 2)));
        assert_eq!(version("ip6tables v1.8.11 (legacy)"), Some((1, 8, 11)));
        assert_eq!(version("busybox"), None);
        assert_eq!(Flavour::of_version("iptables v1.6.2"), Flavour::Legacy);
        assert_eq!("nft".parse(), Ok(Flavour::Nft));
        assert!("nftables".parse::<Flavour>().unwrap_err().contains("legacy"));
    }
}
