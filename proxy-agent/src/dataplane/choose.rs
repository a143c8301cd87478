//! Which dataplanes this node can run, and which of them is run. Changes nothing that is in force.
//!
//! Most of what it takes to start eBPF is loading its programs, and so is most of what it takes to try that out. Whoever starts what is chosen
//! therefore tries eBPF by starting it: programs are loaded once, and not at all where those are pinned already.

use super::{
    DataplaneError, Missing,
    ebpf::probe,
    iptables, ipvs, nftables, remedy,
    select::{Mode, Options},
};

/// One dataplane, and what it would need here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    pub mode: Mode,
    /// Empty: it can run.
    pub missing: Vec<Missing>,
}

/// What is run, and why that.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    pub mode: Mode,
    pub reason: String,
}

impl Candidate {
    /// Tries it: loads the real programs, runs the real tool on rules of every kind, and takes it all back.
    pub fn try_out(mode: Mode, options: &Options) -> Self {
        let Options { mode: _, ebpf, netfilter } = options;
        let tried = match mode {
            Mode::Ebpf => return Self::of_ebpf(&probe::probe(ebpf)),
            Mode::Nftables => nftables::Nftables::try_out(netfilter),
            Mode::Iptables => iptables::Iptables::try_out(netfilter),
            Mode::Ipvs => ipvs::Ipvs::try_out(netfilter),
        };
        Self { mode, missing: tried.err().map(Missing::from).into_iter().collect() }
    }

    /// The same, but that no programs of eBPF's are loaded: whether it can run shows when it is started.
    fn look_at(mode: Mode, options: &Options) -> Self {
        match mode {
            Mode::Ebpf => Self::of_ebpf(&probe::without_programs(&options.ebpf)),
            mode => Self::try_out(mode, options),
        }
    }

    /// The same, of what has been asked already.
    pub fn of_ebpf(checks: &[probe::Check]) -> Self {
        let essential = checks.iter().filter(|check| !check.ok && !check.optional);
        let missing = |check: &probe::Check| Missing {
            what: format!("{}: {}", check.name, check.detail),
            remedy: check.remedy.clone(),
        };
        Self { mode: Mode::Ebpf, missing: essential.map(missing).collect() }
    }

    pub fn can_run(&self) -> bool {
        self.missing.is_empty()
    }

    /// What is missing, in one line.
    pub fn lack(&self) -> String {
        self.missing.iter().map(|missing| missing.what.as_str()).collect::<Vec<_>>().join("; ")
    }

    /// What to do about it, each once.
    pub fn remedy(&self) -> String {
        let mut remedies: Vec<&str> = Vec::new();
        for Missing { remedy, .. } in &self.missing {
            if !remedy.is_empty() && !remedies.contains(&remedy.as_str()) {
                remedies.push(remedy);
            }
        }
        remedies.join("; ")
    }

    /// With the remedy where one thing is missing; of many `check` says each.
    fn verdict(&self) -> String {
        let name = self.mode.name();
        match self.missing.as_slice() {
            [] => format!("{name} can run here"),
            [missing] => format!("{name} cannot run here ({missing})"),
            _ => format!("{name} cannot run here ({})", self.lack()),
        }
    }
}

impl From<DataplaneError> for Missing {
    fn from(error: DataplaneError) -> Self {
        match error {
            DataplaneError::Missing(missing) => missing,
            DataplaneError::Kernel { what, source } => {
                let remedy = remedy(&source).trim_start_matches("; ").to_owned();
                Self { what: format!("{what}: {source}"), remedy }
            }
            DataplaneError::Unavailable(what) => Self { what, remedy: String::new() },
        }
    }
}

/// The first that can run, in the order of [`Mode::ALL`]. `Err` names what each lacks.
pub fn first(options: &Options) -> Result<Choice, DataplaneError> {
    let try_out = |mode| Candidate::try_out(mode, options);
    first_of(try_out, |_| Ok(()), try_out).map(|(choice, ())| choice)
}

/// The same, and what comes of starting it. What fails although the node can run it is an error, and no reason to take another one.
pub fn start_first<T, E: From<DataplaneError>>(
    options: &Options,
    start: impl Fn(&Options) -> Result<T, E>,
) -> Result<(Choice, T), E> {
    first_of(
        |mode| Candidate::look_at(mode, options),
        |mode| start(&Options { mode, ..options.clone() }),
        |mode| Candidate::try_out(mode, options),
    )
}

/// `look` finds most of what is missing, `start` starts it, and where that fails `try_out` tells whether the node is to blame.
fn first_of<T, E: From<DataplaneError>>(
    look: impl Fn(Mode) -> Candidate,
    start: impl Fn(Mode) -> Result<T, E>,
    try_out: impl Fn(Mode) -> Candidate,
) -> Result<(Choice, T), E> {
    let (mut tried, mut remedy) = (Vec::new(), None);
    for mode in Mode::ALL {
        let mut candidate = look(mode);
        if candidate.can_run() {
            match start(mode) {
                Ok(started) => {
                    tried.push(candidate.verdict());
                    return Ok((Choice { mode, reason: format!("auto: {}", tried.join(", ")) }, started));
                }
                Err(error) => {
                    candidate = try_out(mode);
                    if candidate.can_run() {
                        return Err(error);
                    }
                }
            }
        }
        tried.push(candidate.verdict());
        // The first one's is the remedy that is wanted.
        remedy.get_or_insert_with(|| candidate.remedy());
        tracing::debug!(mode = mode.name(), remedy = candidate.remedy(), "cannot run");
    }
    let first = remedy.filter(|remedy| !remedy.is_empty()).map(|remedy| format!("{remedy}; ")).unwrap_or_default();
    Err(E::from(DataplaneError::Unavailable(format!(
        "none of the dataplanes can run on this node: {}; {first}`proxy-agent check` says what to do about each",
        tried.join(", ")
    ))))
}

/// What to run in the place of a mode that was asked for by name and failed. `None`: it could run here, something else is wrong.
pub fn instead(mode: Mode, options: &Options) -> Option<String> {
    if Candidate::try_out(mode, options).can_run() {
        return None;
    }
    let others = Mode::ALL.into_iter().filter(|other| *other != mode);
    Some(advice(others.map(|other| Candidate::try_out(other, options))))
}

fn advice(others: impl IntoIterator<Item = Candidate>) -> String {
    let mut lacks = Vec::new();
    for candidate in others {
        if candidate.can_run() {
            return format!("--proxy-mode {} could run here", candidate.mode.name());
        }
        lacks.push(candidate.verdict());
    }
    format!("no other mode can run here either: {}", lacks.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::ebpf;

    fn lacking(mode: Mode, what: &[&str]) -> Candidate {
        let missing = |what: &&str| Missing { what: (*what).to_owned(), remedy: "run as root".into() };
        Candidate { mode, missing: what.iter().map(missing).collect() }
    }

    /// Of those that are not among `candidates` the node lacks everything.
    fn of(candidates: &[Candidate]) -> impl Fn(Mode) -> Candidate {
        move |mode| {
            let of_mode = candidates.iter().find(|candidate| candidate.mode == mode);
            of_mode.cloned().unwrap_or_else(|| lacking(mode, &["all"]))
        }
    }

    #[test]
    fn the_first_that_can_run_is_run_and_the_others_say_why_not() {
        let first = |candidates: &[Candidate]| -> Result<Choice, DataplaneError> {
            first_of(of(candidates), |_| Ok(()), |_| panic!("nothing failed")).map(|(choice, ())| choice)
        };
        let (ebpf, nftables) = (lacking(Mode::Ebpf, &["CAP_BPF: missing"]), lacking(Mode::Nftables, &[]));
        let choice = first(&[ebpf.clone(), nftables.clone()]).unwrap();
        assert_eq!(choice.mode, Mode::Nftables);
        assert_eq!(choice.reason, "auto: ebpf cannot run here (CAP_BPF: missing; run as root), nftables can run here");
        let two = lacking(Mode::Ebpf, &["CAP_BPF: missing", "BTF: missing"]);
        let choice = first(&[two, nftables.clone()]).unwrap();
        assert_eq!(choice.reason, "auto: ebpf cannot run here (CAP_BPF: missing; BTF: missing), nftables can run here");
        let choice = first(&[lacking(Mode::Ebpf, &[]), nftables]).unwrap();
        assert_eq!((choice.mode, choice.reason.as_str()), (Mode::Ebpf, "auto: ebpf can run here"));
        let error = first(&[ebpf, lacking(Mode::Nftables, &["nft is not there"])]).unwrap_err().to_string();
        assert!(error.contains("CAP_BPF") && error.contains("nft is not there") && error.contains("check"), "{error}");
    }

    #[test]
    fn what_cannot_be_started_is_passed_over_if_the_node_is_to_blame() {
        let all = [Mode::Ebpf, Mode::Nftables].map(|mode| lacking(mode, &[]));
        let start = |failing: Mode| {
            move |mode| {
                if mode == failing { Err(DataplaneError::Unavailable("it failed".into())) } else { Ok(mode) }
            }
        };
        // What is looked at first does not show it; the kernel's refusal does.
        let refused = lacking(Mode::Ebpf, &["load: the kernel refuses the program connect4"]);
        let (choice, started) = first_of(of(&all), start(Mode::Ebpf), of(&[refused])).unwrap();
        assert_eq!((choice.mode, started), (Mode::Nftables, Mode::Nftables));
        let why = "ebpf cannot run here (load: the kernel refuses the program connect4; run as root)";
        assert_eq!(choice.reason, format!("auto: {why}, nftables can run here"));
        // The pins are another agent's, say.
        let error = first_of(of(&all), start(Mode::Ebpf), of(&all)).unwrap_err();
        assert_eq!(error.to_string(), "it failed");
        // Nothing is tried out that starts.
        let (choice, started) = first_of(of(&all), start(Mode::Ipvs), |_| panic!("it started")).unwrap();
        assert_eq!((choice.mode, started), (Mode::Ebpf, Mode::Ebpf));
    }

    #[test]
    fn a_mode_that_could_run_is_named() {
        assert_eq!(advice([lacking(Mode::Nftables, &[])]), "--proxy-mode nftables could run here");
        assert_eq!(
            advice([lacking(Mode::Nftables, &["no nft"])]),
            "no other mode can run here either: nftables cannot run here (no nft; run as root)"
        );
    }

    #[test]
    fn what_is_lacking_is_told_from_what_to_do() {
        let of = |error| {
            let Missing { what, remedy } = Missing::from(error);
            (what, remedy)
        };
        let pair = |what: &str, remedy: &str| (what.to_owned(), remedy.to_owned());
        assert_eq!(of(DataplaneError::missing("no nft", "install it")), pair("no nft", "install it"));
        let source = std::io::Error::from_raw_os_error(libc::EMFILE);
        let text = source.to_string();
        let (what, remedy) = of(DataplaneError::Kernel { what: "IPVS".into(), source });
        assert_eq!((what, remedy.starts_with("too many open files")), (format!("IPVS: {text}"), true));
        assert_eq!(of(DataplaneError::Unavailable("the lock is held".into())), pair("the lock is held", ""));
    }

    #[test]
    fn a_remedy_is_said_once() {
        let candidate = lacking(Mode::Ebpf, &["CAP_BPF: missing", "load: not allowed"]);
        assert_eq!(
            (candidate.lack().as_str(), candidate.remedy().as_str()),
            ("CAP_BPF: missing; load: not allowed", "run as root")
        );
    }

    /// Programs that the kernel refuses are found by loading them, whoever may load them.
    #[test]
    fn an_object_that_is_none_cannot_run() {
        let options = ebpf::Options { object: Some(b"no programs"), ..Default::default() };
        let candidate = Candidate::of_ebpf(&probe::probe(&options));
        assert!(candidate.missing.iter().any(|missing| missing.what.starts_with("load: ")), "{candidate:?}");
    }
}
