//! What IPVS left in force, where another mode takes over.
//!
//! Connections are IPVS' own, and go by the virtual server that they began with: a packet of theirs that comes to the node's input is still
//! translated, but only as long as the device holds the Service's address there. A process of the node that asks the Service by the rules of
//! the mode that takes over goes out with that address as its source, and would lose it in the midst. So nobody is waited for but who has just
//! begun: what is new finds no gap, what lasts ends.

use super::{Ipvs, notes::remove};
use crate::dataplane::{DataplaneError, former, netfilter::Options, select::Mode};

/// See the module.
#[derive(Debug)]
pub(crate) struct Former;

impl former::Former for Former {
    fn name(&self) -> &'static str {
        Mode::Ipvs.name()
    }

    fn is_there(&mut self) -> Result<bool, DataplaneError> {
        Ok(!Ipvs::remains()?.is_empty())
    }

    /// Every other mode translates before IPVS is asked (hooks prerouting and output), so it takes no new flows by itself.
    fn retire(&mut self) -> Result<(), DataplaneError> {
        Ok(())
    }

    /// None that are waited for.
    fn flows(&mut self) -> Result<u64, DataplaneError> {
        Ok(0)
    }

    fn remove(&mut self) -> Result<(), DataplaneError> {
        remove(&Options::default())
    }
}
