//! D6: nanoseconds per packet of the per-packet programs alone, by `BPF_PROG_TEST_RUN`.

use anyhow::Result;

use crate::{Scale, report::Report};

pub fn measure(_scale: &Scale, report: &mut Report) -> Result<()> {
    report.skip("D6: not written yet");
    Ok(())
}
