//! The configuration as a whole: options, environment, file and defaults, each value with where it comes from.
//!
//! A file's fields become options, read by the same parsers. Who wins:
//!
//! ```text
//! ours           option > environment > file > default
//! kube-proxy's   environment > file > default; beside a file its options are not read, as by kube-proxy (contract A142)
//!                but for the node's name, --master and what is about the log, which are ours in this
//! ```
//!
//! So whoever changes the image of a DaemonSet gets what the file says, as before; the environment is a thing of this agent alone, and whoever
//! sets it means it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow};
use clap::{ArgMatches, FromArgMatches, parser::ValueSource};

use super::{
    Args, Together,
    given::{self, Given, word},
};
use crate::{
    cli::exit::UsageError,
    config::{
        self, Document, Field, Here, ProxyMode, Said,
        file::{unsaid, value},
        kube_proxy,
        tree::Tree,
    },
    serve, source,
};

#[derive(Clone, Debug)]
pub struct Effective {
    pub args: Args,
    /// By option.
    pub values: BTreeMap<String, Value>,
    pub file: Option<Read>,
    /// Options that were not read because of the file.
    passed_over: Vec<String>,
}

/// The file as it was read.
#[derive(Clone, Debug)]
pub struct Read {
    pub path: PathBuf,
    pub text: String,
    said: Vec<Said>,
}

/// What an option is set to; `None`: to nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Value {
    pub text: Option<String>,
    pub from: Origin,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    Default,
    Option(String),
    Environment(String),
    File(PathBuf, u64),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Option(long) => write!(f, "--{long}"),
            Self::Environment(name) => write!(f, "${name}"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
        }
    }
}

/// Of what was given, with the file that it names, as that is now.
pub fn of(given: &Given) -> anyhow::Result<Effective> {
    match &given.args.file.config {
        None => without_file(given),
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("reading {} (--config)", path.display()))?;
            with_file(given, path, text)
        }
    }
}

fn without_file(given: &Given) -> anyhow::Result<Effective> {
    let args = given.args.clone();
    Together::of(&args).map_err(|error| UsageError(error.to_string()))?;
    let values = values(&given.matches, &BTreeMap::new(), Path::new(""));
    Ok(Effective { args, values, file: None, passed_over: Vec::new() })
}

/// With a file that holds `text`; every error names it, the line and the field.
pub(super) fn with_file(given: &Given, path: &Path, text: String) -> anyhow::Result<Effective> {
    let wrong = |line, message: &dyn fmt::Display| match line {
        0 => format!("{}: {message}", path.display()),
        line => format!("{}:{line}: {message}", path.display()),
    };
    let said = config::file::read(&text).map_err(|wrongs| {
        let texts: Vec<_> = wrongs.iter().map(|one| wrong(one.line, &one.message)).collect();
        UsageError(texts.join("; "))
    })?;
    let command = given::command();
    // An empty name is in nobody's way, as with kube-proxy.
    const NAME: &str = "hostname-override";
    let from_environment: BTreeSet<&str> = command
        .get_arguments()
        .filter_map(|arg| Some((arg.get_long()?, std::env::var_os(arg.get_env()?)?)))
        .filter(|(long, value)| *long != NAME || !value.is_empty())
        .map(|(long, _)| long)
        .collect();
    let unnamed = given::word(NAME, "");
    let words_of_options = given.words.iter().filter(|(_, word)| *word != unnamed).cloned();
    let (passed_over, stay): (Vec<_>, Vec<_>) = words_of_options.partition(|(long, _)| kube_proxy::gives_way(long));
    let (mut words, mut lines): (Vec<OsString>, BTreeMap<&str, u64>) = (Vec::new(), BTreeMap::new());
    let decided: BTreeSet<&str> =
        stay.iter().map(|(long, _)| long.as_str()).chain(from_environment.iter().copied()).collect();
    let has = |option: &str| decided.contains(option) || said.iter().any(|said| said.field.flag == option);
    let mode = mode(&said);
    for one in &said {
        let option = kube_proxy::option_of(one.field, mode);
        let is_own = one.document == Document::Own;
        let gives_way = decided.contains(option)
            // The other document has it in its own words.
            || !is_own && option == "proxy-mode" && said.iter().any(|said| said.document == Document::Own && said.field.flag == option)
            // Whoever reads a directory asks no API server.
            || option == "kubeconfig" && has("source")
            || option == "master" && decided.contains("source");
        if !option.is_empty() && !gives_way {
            words.push(word(option, &one.text));
            lines.insert(option, one.line);
        }
    }
    words.extend(stay.into_iter().map(|(_, word)| word));
    let parsed = command.clone().try_get_matches_from(&words).and_then(|matches| {
        let args = Args::from_arg_matches(&matches)?;
        Ok((matches, args))
    });
    let (matches, args) = parsed.map_err(|error| {
        // Which of them is to blame shows when they are asked one by one.
        let blamed = said.iter().find_map(|said| {
            let option = kube_proxy::option_of(said.field, mode);
            let line = lines.get(option).filter(|line| **line == said.line)?;
            let error = command.clone().try_get_matches_from([word(option, &said.text)]).err()?;
            Some(wrong(*line, &format!("{}: {}", said.field.path, reason(&error))))
        });
        UsageError(blamed.unwrap_or_else(|| wrong(0, &reason(&error))))
    })?;
    Together::of(&args).map_err(|error| {
        // The first of them that is said here; another may come by option or environment.
        let said = error.options().iter().find_map(|option| {
            let line = *lines.get(option)?;
            let is_it = |said: &&Said| {
                said.line == line
                    && kube_proxy::option_of(said.field, mode) == *option
                    && kube_proxy::elsewhere(said.field, mode).is_none()
            };
            let said = said.iter().find(is_it)?;
            Some(wrong(line, &format!("{}: {error}", said.field.path)))
        });
        UsageError(said.unwrap_or_else(|| wrong(0, &error)))
    })?;
    let values = values(&matches, &lines, path);
    let passed_over = passed_over.into_iter().map(|(long, _)| long).collect();
    Ok(Effective { args, values, file: Some(Read { path: path.to_owned(), text, said }), passed_over })
}

/// Which section counts, of those that each mode has for itself.
fn mode(said: &[Said]) -> ProxyMode {
    let of = |document| said.iter().find(|said| said.document == document && said.field.flag == "proxy-mode");
    let in_file = || of(Document::Own).or_else(|| of(Document::KubeProxy)).map(|said| said.text.clone());
    let text = std::env::var(MODE_VARIABLE).ok().or_else(in_file);
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

const MODE_VARIABLE: &str = "PROXY_AGENT_PROXY_MODE";

/// What is wrong with an option, in a line.
fn reason(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines = lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
    let text = lines.collect::<Vec<_>>().join(" ");
    text.strip_prefix("error: ").unwrap_or(&text).to_owned()
}

fn values(matches: &ArgMatches, lines: &BTreeMap<&str, u64>, path: &Path) -> BTreeMap<String, Value> {
    let command = given::command();
    let one = |arg: &clap::Arg| {
        let long = arg.get_long()?.to_owned();
        let from = match (matches.value_source(arg.get_id().as_str()), lines.get(long.as_str())) {
            (Some(ValueSource::CommandLine), Some(line)) => Origin::File(path.to_owned(), *line),
            (Some(ValueSource::CommandLine), None) => Origin::Option(long.clone()),
            (Some(ValueSource::EnvVariable), _) => {
                Origin::Environment(arg.get_env().unwrap_or_default().to_string_lossy().into_owned())
            }
            _ => Origin::Default,
        };
        let text = given::text(matches, arg).map(|text| text.to_string_lossy().into_owned());
        Some((long, Value { text, from }))
    };
    command.get_arguments().filter_map(one).collect()
}

/// One field as it is in force.
pub struct InForce {
    pub document: Document,
    pub field: &'static Field,
    pub tree: Tree,
    /// As the option has it; empty: nothing.
    pub text: String,
    pub from: Origin,
    /// Why it is not read in the mode that is asked for.
    pub elsewhere: Option<String>,
}

impl Effective {
    /// Every field of both documents.
    pub fn in_force(&self) -> Vec<InForce> {
        let all =
            Document::ALL.into_iter().flat_map(|document| document.fields().iter().map(move |field| (document, field)));
        all.map(|(document, field)| self.field(document, field)).collect()
    }

    fn field(&self, document: Document, field: &'static Field) -> InForce {
        let option = kube_proxy::option_of(field, self.args.proxy_mode);
        let in_file = || {
            let file = self.file.as_ref()?;
            let said = file.said.iter().find(|said| said.document == document && said.field.path == field.path)?;
            Some(Value { text: Some(said.text.clone()), from: Origin::File(file.path.clone(), said.line) })
        };
        let found = self.values.get(option).cloned().or_else(in_file);
        let Value { text, from } = found.unwrap_or(Value { text: None, from: Origin::Default });
        let text = match field.path {
            // kube-proxy has no word for these two.
            "mode" => text.filter(|text| !["auto", "ebpf"].contains(&text.as_str())),
            "healthzBindAddress" => Some(bound(self.args.binds().0)),
            "metricsBindAddress" => Some(bound(self.args.binds().1)),
            _ => text,
        };
        let default = || Some(field.default.to_owned()).filter(|default| !default.is_empty());
        let text = text.filter(|text| !text.is_empty()).or_else(default);
        let tree = text.as_deref().map_or_else(|| unsaid(field), |text| value(field.kind, text));
        let elsewhere = kube_proxy::elsewhere(field, self.args.proxy_mode);
        InForce { document, field, tree, text: text.unwrap_or_default(), from, elsewhere }
    }

    /// The two documents of a file that says the same.
    pub fn documents(&self) -> [Tree; 2] {
        let fields = self.in_force();
        Document::ALL.map(|document| {
            let mut tree = Tree::Null;
            tree.put("apiVersion", Tree::Text(document.api_version().to_owned()));
            tree.put("kind", Tree::Text(document.kind().to_owned()));
            for field in fields.iter().filter(|field| field.document == document) {
                tree.put(field.field.path, field.tree.clone());
            }
            tree
        })
    }

    /// The same for others to see.
    pub fn public(&self) -> Self {
        let mut public = self.clone();
        if let Some(Value { text: Some(address), from: _ }) = public.values.get_mut("master") {
            *address = source::without_password(address);
        }
        public
    }

    /// Those by API group, as `/configz` has them, and all options.
    pub fn shown(&self) -> anyhow::Result<serve::Shown> {
        let public = self.public();
        let groups = Document::ALL.into_iter().zip(public.documents());
        let groups = groups.map(|(document, tree)| (document.api_group().to_owned(), 0, tree)).collect();
        let configz = serde_json::to_string(&Tree::Map(groups)).context("writing JSON")?;
        let flag = |(long, value): (&String, &Value)| (long.clone(), value.text.clone().unwrap_or_default());
        let gates = self.values.get("feature-gates").and_then(|value| value.text.as_deref()).unwrap_or_default();
        Ok(serve::Shown {
            configz,
            flags: public.values.iter().map(flag).collect(),
            flagz: config::gates::is_on(gates, config::gates::FLAGZ),
            statusz: config::gates::is_on(gates, config::gates::STATUSZ),
        })
    }

    /// Those as YAML.
    pub fn yaml(&self) -> anyhow::Result<String> {
        let texts = self.documents().iter().map(serde_saphyr::to_string).collect::<Result<Vec<_>, _>>();
        Ok(texts.context("writing YAML")?.join("---\n"))
    }

    /// What is asked for and will not be had in the mode that runs, one line for each, and why.
    pub fn warnings(&self, running: ProxyMode) -> Vec<String> {
        let mut warnings = Vec::new();
        if let (Some(file), false) = (&self.file, self.passed_over.is_empty()) {
            let options: Vec<_> = self.passed_over.iter().map(|long| format!("--{long}")).collect();
            warnings.push(format!(
                "{}: not read beside --config, as kube-proxy has it; say it in {}, or by an environment variable",
                options.join(", "),
                file.path.display()
            ));
        }
        if let Some(Value { text: Some(text), from }) = self.values.get("feature-gates") {
            let gates = config::gates::without_effect(text);
            if !gates.is_empty() {
                warnings.push(format!("featureGates {gates} ({from}) has no effect: it is of kube-proxy's own code"));
            }
        }
        if let Some(Value { from, .. }) = self.values.get("profiling").filter(|_| self.args.profiling) {
            warnings.push(format!(
                "enableProfiling true ({from}): /debug/flags/v is served; /debug/pprof is of Go, and is not: use perf"
            ));
        }
        let others = kube_proxy::GIVEN_UP.iter().chain(kube_proxy::OPTIONS);
        let others = others.map(|field| self.field(Document::KubeProxy, field));
        for InForce { field, text, from, .. } in self.in_force().into_iter().chain(others) {
            if let Some(why) = self.idle(field, running)
                && from != Origin::Default
                && field.asks(&text)
            {
                warnings.push(format!("{} {text} ({from}) has no effect{why}", field.name()));
            }
        }
        warnings
    }

    /// Why nothing goes by a field in the mode that runs.
    fn idle(&self, field: &Field, running: ProxyMode) -> Option<String> {
        if let Some(why) = kube_proxy::elsewhere(field, self.args.proxy_mode) {
            return Some(format!(": {why}"));
        }
        match field.here {
            Here::Ignored(why) => Some(format!(": {why}")),
            Here::In(modes, why) if !modes.contains(&running) => Some(format!(" in mode {running}: {why}")),
            Here::In(..) | Here::Honoured => None,
        }
    }

    /// Whether anything goes by an option in the mode that runs.
    pub fn counts(&self, long: &str, running: ProxyMode) -> bool {
        let all = Document::ALL.into_iter().flat_map(|document| document.fields()).chain(kube_proxy::OPTIONS);
        let mut fields = all
            .filter(|field| field.flag == long || kube_proxy::option_of(field, self.args.proxy_mode) == long)
            .peekable();
        fields.peek().is_none() || fields.any(|field| self.idle(field, running).is_none())
    }

    /// What an operator who comes from kube-proxy should hear, once.
    pub fn notice(&self) -> Option<String> {
        let InForce { text, from, .. } = self.in_force().into_iter().find(|one| one.field.path == "mode")?;
        let asked = matches!(from, Origin::File(..)) && !text.is_empty();
        asked.then(|| {
            format!(
                "mode {text} ({from}) is what runs, since it is asked for; leave it empty, or put proxyMode: auto into a {} document, \
                 for eBPF where the node can run it",
                Document::Own.kind()
            )
        })
    }

    /// What is wrong with what an option names, with the place in the file where that is said.
    pub(super) fn blame(&self, long: &str, error: impl fmt::Display) -> anyhow::Error {
        match self.values.get(long).map(|value| &value.from) {
            Some(from @ Origin::File(..)) => anyhow!("{from}: {}: {error}", self.name_of(long)),
            _ => anyhow!("{error}"),
        }
    }

    /// Options whose values differ.
    pub fn changes(&self, other: &Self) -> Vec<String> {
        let differs =
            |(long, value): &(&String, &Value)| other.values.get(*long).map(|other| &other.text) != Some(&value.text);
        self.values.iter().filter(differs).map(|(long, _)| long.clone()).collect()
    }

    /// What an option is called by whoever wrote it into the file.
    pub fn name_of(&self, long: &str) -> String {
        let said = self.file.iter().flat_map(|file| &file.said);
        let field = said.map(|said| said.field).chain(Document::ALL.into_iter().flat_map(|document| document.fields()));
        let mode = self.args.proxy_mode;
        let mut named = field.filter(|field| kube_proxy::option_of(field, mode) == long);
        named.next().map_or_else(|| format!("--{long}"), |field| field.path.to_owned())
    }
}

fn bound(address: Option<std::net::SocketAddr>) -> String {
    address.map_or_else(|| "off".to_owned(), |address| address.to_string())
}

#[cfg(test)]
pub(super) mod tests;
