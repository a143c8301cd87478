//! Options of kube-proxy's that nothing here goes by: they are taken, checked, and warned of where they ask for something.

use clap::{Arg, ArgMatches, Args, Command, Error, FromArgMatches};

use crate::config::{Here, Kind, kube_proxy};

/// They have no place of their own: what is given is among the values of the configuration as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Unused;

impl FromArgMatches for Unused {
    fn from_arg_matches(_: &ArgMatches) -> Result<Self, Error> {
        Ok(Self)
    }

    fn update_from_arg_matches(&mut self, _: &ArgMatches) -> Result<(), Error> {
        Ok(())
    }
}

impl Args for Unused {
    fn augment_args(command: Command) -> Command {
        command.args(kube_proxy::without_effect().map(|field| {
            let kind = field.kind;
            let check = move |text: &str| if text.is_empty() && kind != Kind::Bool { Ok(()) } else { kind.check(text) };
            let arg = Arg::new(field.flag)
                .long(field.flag)
                .help(format!("Without effect: {}", reason(field.here)))
                .help_heading("kube-proxy's, without effect here")
                .hide_short_help(true)
                .value_name("VALUE")
                .allow_hyphen_values(true)
                .value_parser(move |text: &str| check(text).map(|()| text.to_owned()));
            if kind == Kind::Bool {
                arg.value_name("BOOL").num_args(0..=1).require_equals(true).default_missing_value("true")
            } else {
                arg
            }
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn reason(here: Here) -> &'static str {
    match here {
        Here::Ignored(why) | Here::In(_, why) => why,
        Here::Honoured => "",
    }
}
