//! The command line: one file per verb. `run` starts the loop; every other verb reads pins, or asks the running agent over HTTP.
//!
//! Data goes to stdout, everything else to stderr. Exit status: [`Exit`].

use std::{
    ffi::{OsStr, OsString},
    io::{self, Write},
    iter,
    path::Path,
    process::ExitCode,
};

use clap::{Parser, Subcommand};

pub mod affinity;
pub mod agent;
pub mod backends;
pub mod check;
pub mod cleanup;
pub mod completions;
pub mod config;
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
    Run(Box<run::Given>),
    /// Print the configuration that `run` would have, and where each value comes from
    Config(Box<config::Args>),
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
    let Cli { verb } = Cli::parse_from(words(std::env::args_os()));
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

/// The command line as ours: under kube-proxy's name without a verb it is `run`, and options may be written with underscores, as kube-proxy's may.
fn words(given: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut given = given.into_iter().peekable();
    let name = given.next().unwrap_or_default();
    let is_kube_proxy = Path::new(&name).file_name() == Some(OsStr::new("kube-proxy"));
    // kube-proxy has no verbs, so a word that is none of its options can be ours alone.
    let has_verb = given.peek().is_some_and(|word| !word.as_encoded_bytes().starts_with(b"-"));
    let run = (is_kube_proxy && !has_verb).then(|| OsString::from("run"));
    iter::once(name).chain(run).chain(given.map(dashed)).collect()
}

/// `--a_b=c_d` as `--a-b=c_d`.
fn dashed(word: OsString) -> OsString {
    let Some(text) = word.to_str().filter(|text| text.starts_with("--")) else { return word };
    let (option, value) = text.find('=').map_or((text, ""), |at| text.split_at(at));
    format!("{}{value}", option.replace('_', "-")).into()
}

fn execute(verb: Verb, out: &mut dyn Write) -> anyhow::Result<Exit> {
    match verb {
        Verb::Run(given) => run::execute(*given, out),
        Verb::Config(args) => config::execute(*args, out),
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
        Cli::try_parse_from(words(args.map(OsString::from))).map_err(|error| error.kind())
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
            (&["run", "--external_ips=F", "--iptables_localhost-nodeports=0"], [false, false]),
        ] {
            let Ok(Cli { verb: Verb::Run(given) }) = parse(args) else { panic!("{args:?}") };
            let parsed = given.args();
            assert_eq!(
                [parsed.external_ips, parsed.netfilter.iptables_localhost_nodeports.unwrap_or(true)],
                on,
                "{args:?}"
            );
        }
        assert_eq!(parse(&["run", "--external-ips=maybe"]).map(|_| ()), Err(ErrorKind::ValueValidation));
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

    /// docs/configuration.md has every field of both documents, with its option, and none that there is not.
    #[test]
    fn the_manual_has_every_field() {
        let text = include_str!("../../../docs/configuration.md");
        for document in crate::config::Document::ALL {
            let section = text.split(&format!("\n## {}\n", document.kind())).nth(1).unwrap();
            let section = section.split("\n## ").next().unwrap();
            let rows = section.lines().filter(|line| line.starts_with("| `"));
            let cell =
                |row: &str, n: usize| row.split('|').nth(n).unwrap_or_default().trim().trim_matches('`').to_owned();
            let documented: Vec<_> = rows.map(|row| (cell(row, 1), cell(row, 2))).collect();
            let option = |flag: &str| if flag.is_empty() { String::new() } else { format!("--{flag}") };
            let real: Vec<_> =
                document.fields().iter().map(|field| (field.path.to_owned(), option(field.flag))).collect();
            assert_eq!(documented, real);
            for field in document.fields() {
                let row = section.lines().find(|line| line.starts_with(&format!("| `{}` |", field.path))).unwrap();
                if let crate::config::Here::Ignored(why) | crate::config::Here::In(_, why) = field.here {
                    assert!(row.contains("**no effect**") && row.contains(why), "{row}");
                } else {
                    assert!(!row.contains("**no effect**"), "{row}");
                }
            }
        }
    }

    #[test]
    fn under_kube_proxys_name_it_runs() {
        let words = |line: &str| {
            let words = words(line.split(' ').map(OsString::from)).into_iter().map(|word| word.into_string().unwrap());
            words.collect::<Vec<_>>().join(" ")
        };
        for (given, taken) in [
            ("/usr/local/bin/kube-proxy --config=/x", "/usr/local/bin/kube-proxy run --config=/x"),
            ("kube-proxy", "kube-proxy run"),
            ("kube-proxy -v 2", "kube-proxy run -v 2"),
            ("kube-proxy status -o json", "kube-proxy status -o json"),
            ("proxy-agent --help", "proxy-agent --help"),
            ("kube-proxy2 --help", "kube-proxy2 --help"),
            ("proxy-agent run --proxy_mode=a_b --log_level x_y", "proxy-agent run --proxy-mode=a_b --log-level x_y"),
        ] {
            assert_eq!(words(given), taken);
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
