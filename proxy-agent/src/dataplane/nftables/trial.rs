//! Whether this node takes our rules: some of every kind are put to nft and the kernel, which check them and change nothing.

use super::{
    NFT, Nftables,
    render::{Renderer, Role},
    shadow::{Found, Item, Servers, Shadow},
};
use crate::{
    dataplane::{
        DataplaneError,
        netfilter::{Options, conntrack::Socket, sample},
    },
    model::Family,
};

impl Nftables {
    /// `Err` says what keeps this dataplane from running here, and what to do about it.
    pub fn try_out(options: &Options) -> Result<(), DataplaneError> {
        Self::try_out_as(Role::Whole, options)
    }

    pub(crate) fn try_out_as(role: Role, options: &Options) -> Result<(), DataplaneError> {
        NFT.run(&["--version"], "")?;
        sample::net_admin()?;
        Socket::open().and_then(|socket| socket.generation()).map_err(|error| {
            DataplaneError::missing(
                format!("the kernel has no nf_tables ({error})"),
                "`modprobe nf_tables`, or CONFIG_NF_TABLES",
            )
        })?;
        NFT.run(&["-j", "list", "tables"], "").map_err(|error| error.lacking("use an nft that is built with JSON"))?;
        for family in sample::families() {
            NFT.run(&["-c", "-f", "-"], &sample(family, role, options)).map_err(|error| {
                error.lacking(
                    "use a kernel that has nf_tables with NAT, conntrack, numgen, reject and masquerade (docs/kernels.md), and nft 1.0.1 or later",
                )
            })?;
        }
        Ok(())
    }
}

/// A transaction that makes a table with rules of every kind, in the place of whatever is there.
fn sample(family: Family, role: Role, options: &Options) -> String {
    let shadow = Shadow::new(Renderer::new(family, role, options));
    let draft = shadow.draft(&items(family, role));
    Shadow::removal(shadow.renderer.ip, shadow.renderer.table()) + &shadow.refill(&draft, &Found::default(), true)
}

fn items(family: Family, role: Role) -> Vec<Item> {
    let frontends = sample::frontends(family).into_iter().map(|(frontend, spec)| Item::Frontend(frontend, Some(spec)));
    let others = [
        Item::Pods([1].into()),
        Item::LocalCidrs([sample::addr(family, 1).into()].into()),
        Item::Guard(sample::addr(family, 100), true),
    ];
    let at = format!("{} . 6 . 80", sample::addr(family, 100));
    let servers = Item::servers(Servers { at: [at].into(), marks: [1].into() });
    others.into_iter().chain((role == Role::Gate).then_some(servers)).chain(frontends).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is not tried is not known: a word that rules are made of, and that no sample has.
    #[test]
    fn the_sample_has_rules_of_every_kind() {
        let common = ["masquerade", "reject", "drop", "meta mark set", "@pods", "@hairpin", "@tcp-sources"];
        let whole = [
            "dnat",
            "numgen random",
            "numgen inc",
            "update @",
            "@sctp-endpoints",
            "@udp-local-endpoints",
            "ct reply ip",
        ];
        let gate = ["accept", "@marks", "@guards", "servers", "ct direction reply"];
        for (family, (role, own)) in Family::BOTH
            .into_iter()
            .flat_map(|family| [(family, (Role::Whole, &whole[..])), (family, (Role::Gate, &gate))])
        {
            let text = sample(family, role, &Options::default());
            for word in common.iter().chain(own) {
                assert!(text.contains(word), "{family:?}: no {word} in\n{text}");
            }
        }
    }
}
