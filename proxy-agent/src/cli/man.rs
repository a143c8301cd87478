//! `man`: the manual page of the program or of one verb, as roff; or all of them into a directory.

use std::{fs, io::Write, path::PathBuf};

use anyhow::Context;
use clap::{Args as ClapArgs, Command, CommandFactory};

use super::{Cli, Exit, exit::UsageError};

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Verb whose page is wanted; without one, the program's own page
    verb: Option<String>,
    /// Write every page into this directory instead
    #[arg(long, value_name = "DIR", conflicts_with = "verb")]
    dir: Option<PathBuf>,
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args { verb, dir } = args;
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    if let Some(dir) = dir {
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        for page in [&program].into_iter().chain(program.get_subcommands()) {
            let path = dir.join(format!("{}.1", page_name(page)));
            fs::write(&path, render(page)?).with_context(|| format!("writing {}", path.display()))?;
        }
        return Ok(Exit::Done);
    }
    let page = match &verb {
        None => &program,
        Some(verb) => {
            program.find_subcommand(verb).ok_or_else(|| UsageError(format!("man {verb}: there is no such verb")))?
        }
    };
    out.write_all(&render(page)?)?;
    Ok(Exit::Done)
}

/// `proxy-agent-services`, so that `man proxy-agent-services` finds it.
fn page_name(page: &Command) -> String {
    page.get_display_name().unwrap_or_else(|| page.get_name()).to_owned()
}

fn render(page: &Command) -> anyhow::Result<Vec<u8>> {
    let mut roff = Vec::new();
    clap_mangen::Man::new(page.clone()).title(page_name(page)).render(&mut roff).context("rendering the page")?;
    Ok(roff)
}
