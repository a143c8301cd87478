//! Opens the dataplane of a mode.

use super::{Dataplane, DataplaneError, ebpf, former::Moving, iptables, ipvs, netfilter, nftables};

/// The dataplanes there are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Mode {
    Ebpf,
    Nftables,
    Iptables,
    Ipvs,
}

impl Mode {
    /// In the order in which `auto` wants them.
    pub const ALL: [Self; 4] = [Self::Ebpf, Self::Nftables, Self::Iptables, Self::Ipvs];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
        }
    }

    /// What is in force is pinned on a bpf filesystem, where every reader finds it.
    pub const fn has_pins(self) -> bool {
        matches!(self, Self::Ebpf)
    }
}

/// What each of them is told.
#[derive(Clone, Debug)]
pub struct Options {
    pub mode: Mode,
    pub ebpf: ebpf::Options,
    pub netfilter: netfilter::Options,
}

/// Changes nothing that is in force. What other modes left is retired once this one is.
pub fn open(options: &Options) -> Result<Box<dyn Dataplane>, DataplaneError> {
    let Options { mode, ebpf, netfilter } = options;
    let moving = Moving::open(options, || {
        Ok(match mode {
            Mode::Ebpf => Box::new(ebpf::Ebpf::open(ebpf)?),
            Mode::Nftables => Box::new(nftables::Nftables::open(netfilter)?),
            Mode::Iptables => Box::new(iptables::Iptables::open(netfilter)?),
            Mode::Ipvs => Box::new(ipvs::Ipvs::open(netfilter)?),
        })
    })?;
    Ok(Box::new(moving))
}
