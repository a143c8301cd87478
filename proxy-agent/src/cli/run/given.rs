//! The options of `run` as they were given, so that a file can be put between them and the defaults, and once more when it changes.

use std::ffi::{OsStr, OsString};

use clap::{Arg, ArgMatches, Args as ClapArgs, Command, Error, FromArgMatches, parser::ValueSource};

use super::Args;

#[derive(Clone, Debug)]
pub struct Given {
    pub(super) args: Args,
    pub(super) matches: ArgMatches,
    /// On the command line: the name of each option, and the whole of it as one word.
    pub(super) words: Vec<(String, OsString)>,
}

impl Given {
    /// Without a file.
    pub fn args(&self) -> &Args {
        &self.args
    }
}

/// `run` and nothing else of the program.
pub(super) fn command() -> Command {
    Args::augment_args(Command::new("run").no_binary_name(true).disable_help_flag(true))
}

/// Values of an option, with commas between; `None`: there is none.
pub(super) fn text(matches: &ArgMatches, arg: &Arg) -> Option<OsString> {
    let raw = matches.get_raw(arg.get_id().as_str())?;
    Some(raw.collect::<Vec<_>>().join(OsStr::new(",")))
}

/// One word that says an option and its value.
pub(super) fn word(long: &str, value: impl AsRef<OsStr>) -> OsString {
    let mut word = OsString::from(format!("--{long}="));
    word.push(value);
    word
}

impl FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let given = |arg: &Arg| {
            let long = arg.get_long()?;
            let source = matches.value_source(arg.get_id().as_str())?;
            (source == ValueSource::CommandLine).then_some((long.to_owned(), word(long, text(matches, arg)?)))
        };
        let words = command().get_arguments().filter_map(given).collect();
        Ok(Self { args: Args::from_arg_matches(matches)?, matches: matches.clone(), words })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl ClapArgs for Given {
    fn augment_args(command: Command) -> Command {
        Args::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Args::augment_args_for_update(command)
    }
}
