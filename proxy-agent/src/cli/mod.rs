//! The command line: one file per verb. `run` starts the loop; every other verb reads pins, or asks the running agent over HTTP.
//!
//! Data goes to stdout, everything else to stderr. Exit status: [`Exit`].

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

pub mod affinity;
pub mod agent;
pub mod backends;
pub mod check;
pub mod cleanup;
pub mod completions;
pub mod connections;
pub mod counters;
pub mod exit;
pub mod filter;
pub mod init;
pub mod list;
pub mod man;
pub mod output;
pub mod pins;
pub mod run;
pub mod services;
pub mod shapes;
pub mod status;

pub use exit::Exit;

/// A kube-proxy replacement: Services and EndpointSlices compiled into eBPF maps
#[derive(Debug, Parser)]
#[command(
    name = "proxy-agent",
    version,
    max_term_width = 100,
    after_help = "Exit status: 0 done, 1 the thing asked for does not hold, 2 usage, 3 could not be done"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Watch Services and EndpointSlices and keep the kernel in step
    Run(Box<run::Args>),
    /// Print what `run` would put in force, as JSON
    #[command(hide = true)]
    PrintPlan(Box<run::planned::Args>),
    /// List the frontends in the kernel and whether each is in force
    #[command(visible_alias = "svc")]
    Services(list::Args),
    /// List which backend serves which frontends
    Backends(list::Args),
    /// List the flows of the per-packet path
    Connections(list::Args),
    /// List whom session affinity remembers, and which backend for them
    Affinity(list::Args),
    /// Show what was counted, per Service and per reason
    Counters(counters::Args),
    /// Show what runs here: agent, hooks, devices, sync, how full the maps are
    Status(status::Args),
    /// Tell whether this node can run the agent, and what to do if not
    Check(check::Args),
    /// Mount a bpf filesystem for the pins where the node has none
    Init(init::Args),
    /// Remove everything of ours from the kernel
    Cleanup(cleanup::Args),
    /// Write a completion script for a shell
    Completions(completions::Args),
    /// Write the manual pages
    Man(man::Args),
}

pub fn main() -> ExitCode {
    let Cli { verb } = Cli::parse();
    let mut out = io::BufWriter::new(io::stdout().lock());
    let outcome = execute(verb, &mut out).and_then(|exit| {
        out.flush()?;
        Ok(exit)
    });
    let exit = outcome.unwrap_or_else(|error| {
        let exit = exit::of_error(&error);
        if exit != Exit::Done {
            // Nobody is left to tell if stderr is gone, too.
            let _ = writeln!(io::stderr(), "error: {error:#}");
        }
        exit
    });
    exit.into()
}

fn execute(verb: Verb, out: &mut dyn Write) -> anyhow::Result<Exit> {
    match verb {
        Verb::Run(args) => run::execute(*args),
        Verb::PrintPlan(args) => run::planned::execute(*args, out),
        Verb::Services(args) => services::execute(args, out),
        Verb::Backends(args) => backends::execute(args, out),
        Verb::Connections(args) => connections::execute(args, out),
        Verb::Affinity(args) => affinity::execute(args, out),
        Verb::Counters(args) => counters::execute(args, out),
        Verb::Status(args) => status::execute(args, out),
        Verb::Check(args) => check::execute(args, out),
        Verb::Init(args) => init::execute(args, out),
        Verb::Cleanup(args) => cleanup::execute(args, out),
        Verb::Completions(args) => completions::execute(args, out),
        Verb::Man(args) => man::execute(args, out),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, error::ErrorKind};

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    fn parse(args: &[&str]) -> Result<Cli, ErrorKind> {
        let args = ["proxy-agent"].into_iter().chain(args.iter().copied());
        Cli::try_parse_from(args).map_err(|error| error.kind())
    }

    #[test]
    fn usage_errors_are_found_before_anything_is_done() {
        for (args, kind) in [
            (&["run", "--source", "a", "--kubeconfig", "b"][..], ErrorKind::ArgumentConflict),
            (&["run", "--proxy-mode", "IPVS"], ErrorKind::ValueValidation),
            (&["run", "--masquerade-ports", "9-1"], ErrorKind::ValueValidation),
            (&["run", "--sync-period", "30"], ErrorKind::ValueValidation),
            (&["run", "--socket-lb", "some"], ErrorKind::InvalidValue),
            (&["run", "--map-slots", "0"], ErrorKind::ValueValidation),
            (&["services", "--service", "web"], ErrorKind::ValueValidation),
            (&["services", "-o", "xml"], ErrorKind::InvalidValue),
            (&["trace"], ErrorKind::InvalidSubcommand),
            (&[], ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        ] {
            assert_eq!(parse(args).map(|_| ()), Err(kind), "{args:?}");
        }
        for args in [&["run"][..], &["run", "--source", "x", "--devices", "eth*,!docker0"], &["svc", "-o", "wide"]] {
            assert!(parse(args).is_ok(), "{args:?}");
        }
    }

    #[test]
    fn what_is_on_can_be_switched_off() {
        for (args, on) in [
            (&["run"][..], [true, true]),
            (&["run", "--external-ips", "--iptables-localhost-nodeports=true"], [true, true]),
            (&["run", "--external-ips=false", "--iptables-localhost-nodeports=false"], [false, false]),
        ] {
            let Ok(Cli { verb: Verb::Run(parsed) }) = parse(args) else { panic!("{args:?}") };
            assert_eq!(
                [parsed.external_ips, parsed.netfilter.iptables_localhost_nodeports.unwrap_or(true)],
                on,
                "{args:?}"
            );
        }
        assert_eq!(parse(&["run", "--external-ips=maybe"]).map(|_| ()), Err(ErrorKind::InvalidValue));
        assert_eq!(parse(&["run", "--external-ips", "false"]).map(|_| ()), Err(ErrorKind::UnknownArgument));
    }

    /// Names of options in a text: `--name`.
    fn options(text: &str) -> std::collections::BTreeSet<&str> {
        let is_of_name = |c: char| c.is_ascii_lowercase() || c == '-';
        text.split("`--").skip(1).map(|rest| rest.split(|c| !is_of_name(c)).next().unwrap_or_default()).collect()
    }

    /// docs/cli.md has every option of `run`, none that there is not, and every annotation.
    #[test]
    fn the_manual_has_every_option() {
        let text = include_str!("../../../docs/cli.md");
        let section = text.split("\n## run\n").nth(1).unwrap().split("\n## ").next().unwrap();
        let documented = options(section);
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        let real: std::collections::BTreeSet<_> =
            run.get_arguments().filter_map(|arg| arg.get_long()).filter(|long| *long != "help").collect();
        assert_eq!(documented, real);
        let annotations = include_str!("../source/mod.rs").split("\"proxy-agent/").skip(1);
        let annotations: Vec<_> = annotations.filter_map(|rest| rest.split('"').next()).collect();
        assert!(annotations.len() > 1, "{annotations:?}");
        for annotation in annotations {
            assert!(section.contains(&format!("`proxy-agent/{annotation}")), "{annotation} is not in docs/cli.md");
        }
    }

    #[test]
    fn what_would_be_in_force_is_printed() {
        let mut out = Vec::new();
        let args = ["--source=../examples", "--hostname-override=node1", "--addresses=192.0.2.1,127.0.0.1"];
        let args = parse(&["print-plan", args[0], args[1], args[2], "--iptables-localhost-nodeports=false"]).unwrap();
        assert_eq!(execute(args.verb, &mut out).unwrap(), Exit::Done);
        let printed: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(printed["problems"], serde_json::json!({}));
        let frontends = printed["frontends"].as_array().unwrap();
        let at = |address: &str| frontends.iter().filter(|frontend| frontend["address"] == address).count();
        assert_eq!([at("10.96.0.10"), at("192.0.2.1"), at("127.0.0.1")], [1, 2, 0], "{printed:#}");
    }

    #[test]
    fn every_page_and_script_can_be_written() {
        for args in [&["man"][..], &["man", "services"], &["completions", "bash"], &["completions", "zsh"]] {
            let mut out = Vec::new();
            assert_eq!(execute(parse(args).unwrap().verb, &mut out).unwrap(), Exit::Done);
            assert!(out.len() > 500, "{args:?}");
        }
        let error = execute(parse(&["man", "trace"]).unwrap().verb, &mut Vec::new()).unwrap_err();
        assert_eq!(exit::of_error(&error), Exit::Usage);
    }
}
