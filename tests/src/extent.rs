//! How much is measured: the options of `cargo xtask bench`, which hands them on to the program that measures.

#[derive(clap::Args, Clone, Debug)]
pub struct Extent {
    /// Under a minute: few rounds, small rulesets, wide spread
    #[arg(long, conflicts_with = "full")]
    pub smoke: bool,
    /// A quarter of an hour: what docs/bench.md quotes (the default)
    #[arg(long)]
    full: bool,
    /// Only these (d1, d2, d3, d5, d6, d7, d9, d13, c3, c11)
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
}

impl Extent {
    /// Whether this is to be measured. C11 waits for minutes for what runs while nothing changes: in a short run only if it is asked for.
    pub fn wants(&self, id: &str) -> bool {
        let Self { smoke, full: _, only } = self;
        if only.is_empty() { !smoke || id != "c11" } else { only.iter().any(|only| only == id) }
    }

    /// The same as options.
    pub fn options(&self) -> Vec<String> {
        let Self { smoke, full: _, only } = self;
        let only = (!only.is_empty()).then(|| format!("--only={}", only.join(",")));
        smoke.then(|| "--smoke".to_owned()).into_iter().chain(only).collect()
    }
}
