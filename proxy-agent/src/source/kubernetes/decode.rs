//! From the server's text to objects, such that one that cannot be read costs nothing but itself (fault F17).
//!
//! The fast way reads everything at once; only where that fails the text is taken apart, object by object. An object that cannot
//! be read is still one that is there: it is named, so that what was known of it can stand. One that does not even say its name
//! cannot be told from others, and makes the whole answer unreadable.

use kube::core::{Status, WatchEvent};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use crate::source::api;

/// An object as it came.
pub(super) enum Object<T> {
    Whole(T),
    Unreadable(Unreadable),
}

/// What can be said of an object that cannot be read.
pub(super) struct Unreadable {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) resource_version: String,
    /// Of an EndpointSlice: the Service whose it says it is.
    pub(super) service: Option<String>,
    pub(super) why: String,
}

/// A page of a list.
pub(super) struct Page<T> {
    pub(super) version: String,
    /// Token of the next page; empty: there is none.
    pub(super) next: String,
    pub(super) objects: Vec<Object<T>>,
}

/// A line of a watch.
pub(super) enum Told<T> {
    Applied(Object<T>),
    Deleted(Object<T>),
    Bookmark(String),
    Error(Box<Status>),
}

#[derive(Deserialize)]
struct List<T> {
    #[serde(default)]
    metadata: ListMetadata,
    #[serde(default = "Option::default")]
    items: Option<Vec<T>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ListMetadata {
    resource_version: String,
    r#continue: String,
}

#[derive(Deserialize)]
struct Line {
    r#type: String,
    object: Box<RawValue>,
}

#[derive(Deserialize)]
struct Named {
    metadata: Name,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Name {
    /// A Node has none.
    #[serde(default)]
    namespace: String,
    name: String,
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    labels: serde_json::Value,
}

pub(super) fn page<T: DeserializeOwned>(text: &str) -> Result<Page<T>, serde_json::Error> {
    let page = |metadata: ListMetadata, objects| {
        let ListMetadata { resource_version: version, r#continue: next } = metadata;
        Page { version, next, objects }
    };
    let error = match serde_json::from_str::<List<T>>(text) {
        Ok(List { metadata, items }) => {
            return Ok(page(metadata, items.unwrap_or_default().into_iter().map(Object::Whole).collect()));
        }
        Err(error) => error,
    };
    let Ok(List { metadata, items }) = serde_json::from_str::<List<Box<RawValue>>>(text) else { return Err(error) };
    let objects: Option<Vec<Object<T>>> = items.unwrap_or_default().iter().map(|item| object(item)).collect();
    objects.map(|objects| page(metadata, objects)).ok_or(error)
}

/// `None`: a line that broke off.
pub(super) fn line<T: DeserializeOwned + Clone>(line: &str) -> Result<Option<Told<T>>, kube::Error> {
    let error = match serde_json::from_str::<WatchEvent<T>>(line) {
        Ok(event) => {
            return Ok(Some(match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => Told::Applied(Object::Whole(object)),
                WatchEvent::Deleted(object) => Told::Deleted(Object::Whole(object)),
                WatchEvent::Bookmark(bookmark) => Told::Bookmark(bookmark.metadata.resource_version),
                WatchEvent::Error(status) => Told::Error(status),
            }));
        }
        Err(error) if error.is_eof() => return Ok(None),
        Err(error) => error,
    };
    if let Ok(Line { r#type, object: raw }) = serde_json::from_str(line)
        && let Some(object) = object(&raw)
    {
        match r#type.as_str() {
            "ADDED" | "MODIFIED" => return Ok(Some(Told::Applied(object))),
            "DELETED" => return Ok(Some(Told::Deleted(object))),
            _ => {}
        }
    }
    Err(match serde_json::from_str::<Status>(line) {
        Ok(status) => kube::Error::Api(status.boxed()),
        Err(_) => kube::Error::SerdeError(error),
    })
}

fn object<T: DeserializeOwned>(raw: &RawValue) -> Option<Object<T>> {
    let why = match serde_json::from_str(raw.get()) {
        Ok(object) => return Some(Object::Whole(object)),
        Err(why) => why.to_string(),
    };
    let Named { metadata: Name { namespace, name, resource_version, labels } } =
        serde_json::from_str(raw.get()).ok()?;
    let service = labels.get(api::SERVICE_NAME_LABEL).and_then(|service| service.as_str()).map(str::to_owned);
    (!name.is_empty()).then_some(Object::Unreadable(Unreadable { namespace, name, resource_version, service, why }))
}
