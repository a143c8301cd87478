//! Whether this node takes our rules: some of every kind are put to iptables-restore, which reads them and changes nothing.

use super::{
    Iptables, flavour,
    render::{Pods, Renderer, Unit},
    shadow::{self, Item, Shadow, Stand},
};
use crate::{
    dataplane::{
        DataplaneError,
        netfilter::{Options, sample},
    },
    model::Family,
};

impl Iptables {
    /// `Err` says what keeps this dataplane from running here, and what to do about it.
    pub fn try_out(options: &Options) -> Result<(), DataplaneError> {
        sample::net_admin()?;
        let tools = flavour::choose(options.iptables_flavour)?.tools;
        tools.are_allowed()?;
        for family in sample::families() {
            tools.test(family, &text(family, options)).map_err(|error| {
                error.lacking(
                    "use a kernel that has netfilter's NAT, and the matches and targets of iptables (docs/kernels.md)",
                )
            })?;
        }
        Ok(())
    }
}

fn text(family: Family, options: &Options) -> String {
    let mut shadow = Shadow::new(Renderer {
        family,
        mark: options.mark(),
        masquerade_ports: options.masquerade_ports,
        localhost: options.localhost_node_ports,
        route_localnet: (options.localhost_node_ports && family == Family::V4).then_some(0),
        liberal: false,
    });
    let unit = |(frontend, spec)| {
        let unit = Unit::from([(frontend, std::sync::Arc::clone(&spec))]);
        Item::Unit(spec.service.clone(), Some(Stand::Planned(unit)))
    };
    let others = [
        Item::Guard(sample::addr(family, 100), true),
        Item::Pods(Pods::Cidrs([sample::addr(family, 1).into()].into())),
        Item::Health([1].into()),
    ];
    shadow.turn(others.into_iter().chain(sample::frontends(family).into_iter().map(unit)).collect());
    let (there, _) = shadow::trial(&shadow);
    there
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is not tried is not known: a word that rules are made of, and that no sample has.
    #[test]
    fn the_sample_has_rules_of_every_kind() {
        for family in Family::BOTH {
            let text = text(family, &Options::default());
            for word in [
                "DNAT",
                "statistic --mode random",
                "recent",
                "MASQUERADE",
                "REJECT",
                "DROP",
                "MARK",
                "conntrack",
                "sctp",
            ] {
                assert!(text.contains(word), "{family:?}: no {word} in\n{text}");
            }
        }
    }
}
