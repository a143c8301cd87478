//! YAML as a tree: read with the line that each thing stands at, written in an order of one's own.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, SeqAccess, Visitor},
    ser::SerializeMap,
};
use serde_saphyr::Spanned;

/// Counted from 1; 0 is unknown.
pub type Line = u64;

#[derive(Clone, PartialEq, Debug)]
pub enum Tree {
    Null,
    Bool(bool),
    Int(i64),
    Number(f64),
    Text(String),
    List(Vec<Self>),
    /// With the line of each.
    Map(Vec<(String, Line, Self)>),
}

/// The documents of a file; empty ones are none.
pub fn read(text: &str) -> Result<Vec<(Line, Tree)>, (Line, String)> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        // `xdp: off` is a word.
        strict_booleans: true,
    };
    let documents: Vec<Spanned<Tree>> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| (error.location().map_or(0, |location| location.line()), error.to_string()))?;
    let documents = documents.into_iter().map(|document| (document.defined.line(), document.value));
    Ok(documents.filter(|(_, tree)| *tree != Tree::Null).collect())
}

impl Tree {
    /// A map in which `path`, `a.b`, is this; others stand beside it.
    pub fn put(&mut self, path: &str, value: Self) {
        if !matches!(self, Self::Map(_)) {
            *self = Self::Map(Vec::new());
        }
        let Self::Map(entries) = self else { return };
        let (key, rest) = path.split_once('.').unwrap_or((path, ""));
        if rest.is_empty() {
            entries.push((key.to_owned(), 0, value));
            return;
        }
        if let Some((_, _, section)) = entries.iter_mut().find(|(name, _, _)| name == key) {
            section.put(rest, value);
        } else {
            let mut section = Self::Null;
            section.put(rest, value);
            entries.push((key.to_owned(), 0, section));
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Tree;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Tree, E> {
                Ok(Tree::Null)
            }

            fn visit_none<E>(self) -> Result<Tree, E> {
                Ok(Tree::Null)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
                Tree::deserialize(deserializer)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
                Ok(Tree::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
                Ok(Tree::Int(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
                Ok(i64::try_from(value).map_or(Tree::Number(value as f64), Tree::Int))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
                Ok(Tree::Number(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
                Ok(Tree::Text(value.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Tree, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(Tree::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Tree, A::Error> {
                let mut map = Vec::new();
                while let Some(key) = entries.next_key::<Spanned<String>>()? {
                    map.push((key.value, key.referenced.line(), entries.next_value()?));
                }
                Ok(Tree::Map(map))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

impl Serialize for Tree {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
            Self::Number(value) => serializer.serialize_f64(*value),
            Self::Text(value) => serializer.serialize_str(value),
            Self::List(list) => list.serialize(serializer),
            Self::Map(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (key, _, value) in entries {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_its_line() {
        let documents = read("a: 1\nb:\n  c: [x, \"2\"]\n  d: null\n---\n# nothing\n---\n\"e\": 1.5\n").unwrap();
        let text = |text: &str| Tree::Text(text.to_owned());
        let inner =
            Tree::Map(vec![("c".into(), 3, Tree::List(vec![text("x"), text("2")])), ("d".into(), 4, Tree::Null)]);
        let first = Tree::Map(vec![("a".into(), 1, Tree::Int(1)), ("b".into(), 2, inner)]);
        let second = Tree::Map(vec![("e".into(), 8, Tree::Number(1.5))]);
        assert_eq!(documents, [(1, first), (8, second)]);
    }

    #[test]
    fn what_is_no_yaml_has_a_line_too() {
        for (text, line) in [("a: 1\na: 2\n", 2), ("a: 1\nb: [\n", 3)] {
            let (at, message) = read(text).unwrap_err();
            assert!(at.abs_diff(line) <= 1 && !message.contains('\n'), "{at} {message}");
        }
        assert_eq!(read(""), Ok(Vec::new()));
    }

    #[test]
    fn sections_are_made_as_they_come() {
        let mut tree = Tree::Null;
        for (path, value) in [("a", 1), ("b.c", 2), ("b.d.e", 3)] {
            tree.put(path, Tree::Int(value));
        }
        assert_eq!(serde_json::to_string(&tree).unwrap(), r#"{"a":1,"b":{"c":2,"d":{"e":3}}}"#);
    }
}
