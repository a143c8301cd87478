//! A configuration file: what its documents say, field by field, or all that is wrong with them. And the other way round.
//!
//! kube-proxy takes an unknown field for a warning and goes on without; here it is an error, for whoever misspells a name means it. What
//! kube-proxy once had and gave up is read, so that there is something to warn of.

use std::{collections::BTreeSet, fmt};

use super::{
    Document, Field, Kind,
    field::{hint, nearest},
    tree::{self, Line, Tree},
};

/// What a file says of one field.
#[derive(Clone, PartialEq, Debug)]
pub struct Said {
    pub document: Document,
    pub field: &'static Field,
    /// As the option of the same meaning would have it.
    pub text: String,
    pub line: Line,
}

/// What is wrong, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wrong {
    pub line: Line,
    pub message: String,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.message),
            line => write!(f, "line {line}: {}", self.message),
        }
    }
}

/// What is said in a file; what is null, or is nought where that means nothing, is left out.
pub fn read(text: &str) -> Result<Vec<Said>, Vec<Wrong>> {
    let documents = tree::read(text).map_err(|(line, message)| vec![Wrong { line, message }])?;
    let (mut said, mut wrong, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    if documents.is_empty() {
        let message = format!("there is nothing in it; it wants a {}", Document::KubeProxy.kind());
        wrong.push(Wrong { line: 0, message });
    }
    for (line, tree) in documents {
        match document(line, &tree) {
            Ok(document) if !seen.insert(document) => {
                wrong.push(Wrong { line, message: format!("a second {}; one file has one of each", document.kind()) });
            }
            Ok(document) => Reader { document, said: &mut said, wrong: &mut wrong }.section("", &tree),
            Err(error) => wrong.push(error),
        }
    }
    if wrong.is_empty() { Ok(said) } else { Err(wrong) }
}

/// Which of the two it is.
fn document(line: Line, tree: &Tree) -> Result<Document, Wrong> {
    let Tree::Map(entries) = tree else {
        return Err(Wrong { line, message: "a document has to be a map of fields".into() });
    };
    let text = |key: &str| {
        entries.iter().find(|(name, _, _)| name == key).and_then(|(_, line, value)| match value {
            Tree::Text(text) => Some((*line, text.as_str())),
            _ => None,
        })
    };
    let kinds =
        || Document::ALL.map(|document| format!("{} ({})", document.kind(), document.api_version())).join(" or ");
    let Some((at, kind)) = text("kind") else {
        return Err(Wrong { line, message: format!("kind is missing: {}", kinds()) });
    };
    let Some(document) = Document::ALL.into_iter().find(|document| document.kind() == kind) else {
        return Err(Wrong { line: at, message: format!("kind {kind:?} is none that this file can have: {}", kinds()) });
    };
    match text("apiVersion") {
        Some((_, version)) if version == document.api_version() => Ok(document),
        Some((line, version)) => {
            let message = format!("apiVersion {version:?} of a {kind}: there is {} alone", document.api_version());
            Err(Wrong { line, message })
        }
        None => Err(Wrong { line, message: format!("apiVersion is missing: {}", document.api_version()) }),
    }
}

struct Reader<'a> {
    document: Document,
    said: &'a mut Vec<Said>,
    wrong: &'a mut Vec<Wrong>,
}

impl Reader<'_> {
    fn section(&mut self, prefix: &str, tree: &Tree) {
        let Tree::Map(entries) = tree else { return };
        for (key, line, value) in entries {
            if prefix.is_empty() && ["kind", "apiVersion"].contains(&key.as_str()) {
                continue;
            }
            let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            let fields = self.document.fields();
            let below = |field: &Field| field.path.strip_prefix(&path).is_some_and(|rest| rest.starts_with('.'));
            if let Some(field) = fields.iter().chain(self.document.given_up()).find(|field| field.path == path) {
                self.field(field, *line, value);
            } else if !fields.iter().any(below) {
                let hint = hint(nearest(key, siblings(fields, prefix).into_iter()));
                let message = format!("{path}: {} has no such field{hint}", self.document.kind());
                self.wrong.push(Wrong { line: *line, message });
            } else if matches!(value, Tree::Map(_)) {
                self.section(&path, value);
            } else if *value != Tree::Null {
                self.wrong.push(Wrong { line: *line, message: format!("{path}: must be a map of fields") });
            }
        }
    }

    fn field(&mut self, field: &'static Field, line: Line, value: &Tree) {
        let read = match value {
            Tree::Null => return,
            value => text(field.kind, value).and_then(|text| {
                // What means nothing is not looked at any closer.
                let is_unsaid = !field.zero_counts && field.kind.is_zero(&text);
                if is_unsaid { Ok(None) } else { field.kind.check(&text).map(|()| Some(text)) }
            }),
        };
        match read {
            Ok(None) => {}
            Ok(Some(text)) => self.said.push(Said { document: self.document, field, text, line }),
            Err(why) => self.wrong.push(Wrong { line, message: format!("{}: {why}", field.path) }),
        }
    }
}

/// What stands in the same section.
fn siblings(fields: &'static [Field], prefix: &str) -> BTreeSet<&'static str> {
    let inside = |path: &'static str| {
        if prefix.is_empty() { Some(path) } else { path.strip_prefix(prefix)?.strip_prefix('.') }
    };
    fields.iter().filter_map(|field| inside(field.path)?.split('.').next()).collect()
}

/// As the option has it.
fn text(kind: Kind, value: &Tree) -> Result<String, String> {
    let wanted = || format!("must be {}", kind.wanted());
    let joined = |texts: Option<Vec<String>>| texts.map(|texts| texts.join(",")).ok_or_else(wanted);
    match (kind, value) {
        (Kind::Bool, Tree::Bool(value)) => Ok(value.to_string()),
        (Kind::Int(..) | Kind::Number | Kind::Quantity, Tree::Int(value)) => Ok(value.to_string()),
        (Kind::Number, Tree::Number(value)) => Ok(value.to_string()),
        (Kind::Nanoseconds, Tree::Int(value)) => Ok(format!("{value}ns")),
        (
            Kind::Text | Kind::Duration | Kind::Period | Kind::Nanoseconds | Kind::Quantity | Kind::MinorVersion,
            Tree::Text(value),
        ) => Ok(value.clone()),
        (Kind::List, Tree::List(items)) => joined(items.iter().map(item).collect()),
        (Kind::Gates, Tree::Map(gates)) => joined(gates.iter().map(gate).collect()),
        (Kind::Levels, Tree::List(items)) => joined(items.iter().map(level).collect()),
        _ => Err(wanted()),
    }
}

fn item(item: &Tree) -> Option<String> {
    match item {
        Tree::Text(text) if !text.contains(',') => Some(text.clone()),
        _ => None,
    }
}

fn gate((gate, _, value): &(String, Line, Tree)) -> Option<String> {
    match value {
        Tree::Bool(value) => Some(format!("{gate}={value}")),
        _ => None,
    }
}

fn level(item: &Tree) -> Option<String> {
    let Tree::Map(entries) = item else { return None };
    let of = |key: &str| entries.iter().find(|(name, _, _)| name == key).map(|(_, _, value)| value);
    match (of("filePattern"), of("verbosity"), entries.len()) {
        (Some(Tree::Text(pattern)), Some(Tree::Int(verbosity)), 2) => Some(format!("{pattern}={verbosity}")),
        _ => None,
    }
}

/// The other way round: as the file has it.
pub fn value(kind: Kind, text: &str) -> Tree {
    let parts = || text.split(',').filter(|part| !part.is_empty());
    match kind {
        Kind::Bool => Tree::Bool(super::boolean(text).unwrap_or_default()),
        Kind::Int(..) => text.parse().map_or(Tree::Null, Tree::Int),
        Kind::Number => text.parse().map_or(Tree::Null, Tree::Number),
        Kind::Text | Kind::Duration | Kind::Period | Kind::Nanoseconds | Kind::Quantity | Kind::MinorVersion => {
            Tree::Text(text.to_owned())
        }
        Kind::List => Tree::List(parts().map(|part| Tree::Text(part.to_owned())).collect()),
        Kind::Gates => {
            let gates = parts().filter_map(|part| part.split_once('='));
            Tree::Map(gates.map(|(gate, on)| (gate.trim().to_owned(), 0, value(Kind::Bool, on.trim()))).collect())
        }
        Kind::Levels => {
            let item = |(pattern, level): (&str, &str)| {
                let mut item = Tree::Null;
                item.put("filePattern", Tree::Text(pattern.to_owned()));
                item.put("verbosity", value(Kind::Int(0, i64::MAX), level));
                item
            };
            Tree::List(parts().filter_map(|part| part.split_once('=')).map(item).collect())
        }
    }
}

/// What stands where nothing is said.
pub fn unsaid(field: &Field) -> Tree {
    if field.zero_counts {
        return Tree::Null;
    }
    match field.kind {
        Kind::Duration | Kind::Period | Kind::Nanoseconds => Tree::Text("0s".into()),
        Kind::Int(..) => Tree::Int(0),
        Kind::Quantity => Tree::Text("0".into()),
        kind => value(kind, ""),
    }
}

#[cfg(test)]
mod tests;
