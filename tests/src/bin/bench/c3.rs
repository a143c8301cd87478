//! C3.
use std::path::Path;

use anyhow::Result;

use crate::{Scale, report::Report, world::Cgroups};

pub fn measure(_scale: &Scale, _agent: Option<&Path>, _cgroups: &Cgroups, report: &mut Report) -> Result<()> {
    report.skip("C3: not written yet");
    Ok(())
}
