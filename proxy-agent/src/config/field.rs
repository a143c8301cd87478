//! A field of the configuration: where it stands, which option of `run` says the same, how it is written, what it is by default, and
//! whether anything here goes by it.

use std::fmt;

use super::{ProxyMode, duration, gates, period};

/// One of the documents of a configuration file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Document {
    KubeProxy,
    Own,
}

impl Document {
    pub const ALL: [Self; 2] = [Self::KubeProxy, Self::Own];

    pub const fn kind(self) -> &'static str {
        match self {
            Self::KubeProxy => "KubeProxyConfiguration",
            Self::Own => "ProxyAgentConfiguration",
        }
    }

    pub const fn api_version(self) -> &'static str {
        match self {
            Self::KubeProxy => "kubeproxy.config.k8s.io/v1alpha1",
            Self::Own => "proxy-agent/v1alpha1",
        }
    }

    pub fn api_group(self) -> &'static str {
        self.api_version().split('/').next().unwrap_or_default()
    }

    pub const fn fields(self) -> &'static [Field] {
        match self {
            Self::KubeProxy => super::kube_proxy::FIELDS,
            Self::Own => super::own::FIELDS,
        }
    }

    /// Fields that were given up: read, and nothing else.
    pub const fn given_up(self) -> &'static [Field] {
        match self {
            Self::KubeProxy => super::kube_proxy::GIVEN_UP,
            Self::Own => &[],
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Field {
    /// Its place in its document, `iptables.masqueradeBit`; empty: an option that no field has.
    pub path: &'static str,
    /// The option, without `--`; empty: none has it.
    pub flag: &'static str,
    pub kind: Kind,
    /// As `run` has it where nothing is said; empty: there is none.
    pub default: &'static str,
    /// As kube-proxy has it, where that is another.
    pub theirs: &'static str,
    /// Nought, empty and false are values. Of all others they mean that nothing is said, as Go's types have it.
    pub zero_counts: bool,
    pub here: Here,
}

/// Whether anything here goes by a field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Here {
    Honoured,
    /// By these modes alone, and why not by the others.
    In(&'static [ProxyMode], &'static str),
    /// By nothing, and why not.
    Ignored(&'static str),
}

impl Field {
    pub(super) const fn new(path: &'static str, flag: &'static str, kind: Kind, default: &'static str) -> Self {
        Self { path, flag, kind, default, theirs: default, zero_counts: false, here: Here::Honoured }
    }

    pub(super) const fn theirs(self, theirs: &'static str) -> Self {
        Self { theirs, ..self }
    }

    pub(super) const fn zero_counts(self) -> Self {
        Self { zero_counts: true, ..self }
    }

    pub(super) const fn ignored(self, why: &'static str) -> Self {
        Self { here: Here::Ignored(why), ..self }
    }

    pub(super) const fn only_in(self, modes: &'static [ProxyMode], why: &'static str) -> Self {
        Self { here: Here::In(modes, why), ..self }
    }

    /// Whether `text` asks for anything: what is said and is the default, kube-proxy's or ours, does not; nor does nought, but where it
    /// stands in place of a default.
    pub fn asks(&self, text: &str) -> bool {
        let is = |default: &str| match self.kind {
            Kind::Duration | Kind::Period | Kind::Nanoseconds => duration(text) == duration(default),
            Kind::Number => text.parse::<f64>().ok() == default.parse::<f64>().ok(),
            _ => text == default,
        };
        let leaves_it = self.kind.is_zero(text) && (!self.zero_counts || self.default.is_empty());
        !is(self.default) && !is(self.theirs) && !leaves_it
    }

    /// What it is called: by its place, or by its option.
    pub fn name(&self) -> Name<'_> {
        Name(self)
    }
}

/// Shows as `iptables.masqueradeBit`, or `--master`.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a>(&'a Field);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.path.is_empty() { write!(f, "--{}", self.0.flag) } else { f.write_str(self.0.path) }
    }
}

/// How a value is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Bool,
    /// Least and greatest.
    Int(i64, i64),
    Number,
    Text,
    /// `1m30s`
    Duration,
    /// A duration of more than nought.
    Period,
    /// A duration, or a number of nanoseconds.
    Nanoseconds,
    /// Texts; as an option with commas between.
    List,
    /// `1.35`
    MinorVersion,
    /// Feature gates by name; as an option `A=true,B=false`.
    Gates,
    /// Verbosity by pattern of file names; as an option `a=1,b=2`.
    Levels,
    /// Bytes: 512, 1K, 2Mi.
    Quantity,
}

impl Kind {
    /// What is wrong with a value, as an option has it.
    pub fn check(self, text: &str) -> Result<(), String> {
        match self {
            Self::Bool => super::boolean(text).map(drop).map_err(|error| error.to_string()),
            Self::Int(least, most) => match text.parse::<i64>() {
                Ok(number) if (least..=most).contains(&number) => Ok(()),
                Ok(_) if most >= i64::from(i32::MAX) => Err(format!("must be {least} or more")),
                Ok(_) => Err(format!("must be from {least} to {most}")),
                Err(_) => Err(format!("{text:?} is no whole number")),
            },
            Self::Number => text.parse::<f64>().map(drop).map_err(|_| format!("{text:?} is no number")),
            Self::Duration | Self::Nanoseconds => duration(text).map(drop).map_err(|error| error.to_string()),
            Self::Period => period(text).map(drop),
            Self::Gates => gates::check(text),
            Self::Levels => levels(text),
            Self::Quantity => quantity(text),
            Self::MinorVersion => minor_version(text),
            Self::Text | Self::List => Ok(()),
        }
    }

    /// Whether it is what Go's type has where nothing is said.
    pub fn is_zero(self, text: &str) -> bool {
        match self {
            Self::Bool => super::boolean(text) == Ok(false),
            Self::Int(..) | Self::Number | Self::Quantity => text.parse::<f64>() == Ok(0.0),
            Self::Duration | Self::Period | Self::Nanoseconds => duration(text).is_ok_and(|it| it.is_zero()),
            Self::Text | Self::List | Self::MinorVersion | Self::Gates | Self::Levels => text.is_empty(),
        }
    }

    /// For the one who wrote something else.
    pub(super) const fn wanted(self) -> &'static str {
        match self {
            Self::Bool => "true or false",
            Self::Int(..) => "a whole number",
            Self::Number => "a number",
            Self::Text => "a text (in quotes, if it looks like something else)",
            Self::Duration | Self::Period => "a duration such as 30s",
            Self::Nanoseconds => "a duration such as 5s, or a number of nanoseconds",
            Self::List => "a list of texts",
            Self::MinorVersion => "a version in quotes, such as \"1.35\"",
            Self::Gates => "a map of names to true or false",
            Self::Levels => "a list of filePattern and verbosity",
            Self::Quantity => "a number of bytes such as 512 or 2Mi",
        }
    }
}

fn levels(text: &str) -> Result<(), String> {
    for one in text.split(',').filter(|one| !one.is_empty()) {
        let level = one.split_once('=').filter(|(pattern, _)| !pattern.is_empty());
        if level
            .is_none_or(|(_, level)| level.parse::<i32>().is_ok_and(|level| level < 0) || level.parse::<i32>().is_err())
        {
            return Err(format!("{one:?} is no pattern with a verbosity; write it as PATTERN=N"));
        }
    }
    Ok(())
}

fn minor_version(text: &str) -> Result<(), String> {
    let is_number = |part: &str| part.parse::<u32>().is_ok();
    let known = text.split_once('.').is_some_and(|(major, minor)| is_number(major) && is_number(minor));
    if known { Ok(()) } else { Err(format!("{text:?} is no minor version of Kubernetes; write it as 1.35")) }
}

fn quantity(text: &str) -> Result<(), String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let units = ["", "k", "K", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"];
    let known = digits.parse::<f64>().is_ok_and(|number| number >= 0.0) && units.contains(&unit);
    if known { Ok(()) } else { Err(format!("{text:?} is no number of bytes; write it as 512, 1K or 2Mi")) }
}

/// The one of `names` that was probably meant, if any comes near.
pub(super) fn nearest<'a>(meant: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let lower = meant.to_lowercase();
    names
        .map(|name| (distance(&lower, &name.to_lowercase()), name))
        .min()
        .filter(|(distance, _)| *distance <= meant.len().div_ceil(3))
        .map(|(_, name)| name)
}

pub(super) fn hint(nearest: Option<&str>) -> String {
    nearest.map(|name| format!("; is {name} meant?")).unwrap_or_default()
}

/// How many letters have to be put in, left out or changed.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, letter) in one.chars().enumerate() {
        let mut next = vec![i + 1];
        for ((above_left, above), known) in row.iter().zip(row.iter().skip(1)).zip(&other) {
            let left = next.last().copied().unwrap_or_default();
            next.push((above_left + usize::from(letter != *known)).min(above + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn fields_are_told_apart_and_their_defaults_are_sound() {
        for document in Document::ALL {
            let mut seen = BTreeSet::new();
            for field in document.fields() {
                assert!(!field.path.is_empty() && seen.insert(field.path), "{field:?}");
                if !field.default.is_empty() {
                    assert_eq!(field.kind.check(field.default), Ok(()), "{field:?}");
                }
                assert!(!field.asks(field.default), "{field:?}: the default asks for nothing");
            }
        }
    }

    #[test]
    fn what_asks_for_something() {
        let field = Field::new("a", "a", Kind::Period, "15m");
        assert_eq!(["15m0s", "900s", "0s", "1m"].map(|text| field.asks(text)), [false, false, false, true]);
        let number = Field::new("a", "a", Kind::Number, "5");
        assert_eq!(["5.0", "0", "50"].map(|text| number.asks(text)), [false, false, true]);
        let list = Field::new("a", "a", Kind::List, "");
        assert_eq!(["", "10.0.0.0/8"].map(|text| list.asks(text)), [false, true]);
        // kube-proxy's default asks for nothing, and nought for something where it is a value like others.
        let theirs = Field::new("a", "a", Kind::Duration, "0s").theirs("1s");
        assert_eq!(["1s", "1000ms", "0s", "2s"].map(|text| theirs.asks(text)), [false, false, false, true]);
        let bit = Field::new("a", "a", Kind::Int(0, 31), "14").zero_counts();
        assert_eq!(["0", "14", "3"].map(|text| bit.asks(text)), [true, false, true]);
        let entries = Field::new("a", "a", Kind::Int(0, 31), "").zero_counts();
        assert_eq!(["0", "3"].map(|text| entries.asks(text)), [false, true]);
    }

    #[test]
    fn what_is_wrong_is_found() {
        let bad = [
            (Kind::Int(0, 31), "32"),
            (Kind::Int(0, i64::MAX), "-1"),
            (Kind::Int(0, 31), "x"),
            (Kind::Number, "many"),
            (Kind::Period, "0s"),
            (Kind::Duration, "30"),
            (Kind::Gates, "NoSuchGate=true"),
            (Kind::Levels, "a=b"),
            (Kind::Levels, "=1"),
            (Kind::Levels, "a=-1"),
            (Kind::Quantity, "1X"),
            (Kind::MinorVersion, "1"),
            (Kind::MinorVersion, "v1.35"),
            (Kind::MinorVersion, "1.35.2"),
            (Kind::Quantity, "-1"),
        ];
        for (kind, text) in bad {
            assert!(kind.check(text).is_err(), "{kind:?} {text}");
        }
        let good = [
            (Kind::MinorVersion, "1.35"),
            (Kind::Int(0, 31), "31"),
            (Kind::Quantity, "2Mi"),
            (Kind::Levels, "a=1,b*=2"),
            (Kind::Nanoseconds, "5s"),
        ];
        for (kind, text) in good {
            assert_eq!(kind.check(text), Ok(()), "{kind:?} {text}");
        }
    }

    #[test]
    fn what_was_meant() {
        let names = || ["masqueradeBit", "masqueradeAll", "syncPeriod"].into_iter();
        assert_eq!(nearest("masquaradeall", names()), Some("masqueradeAll"));
        assert_eq!(nearest("sync_period", names()), Some("syncPeriod"));
        assert_eq!(nearest("colour", names()), None);
        assert_eq!([distance("abc", "abd"), distance("", "ab"), distance("kitten", "sitting")], [1, 2, 3]);
    }
}
