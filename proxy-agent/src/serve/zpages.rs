//! What Kubernetes' components say of themselves at their metrics address, and how much they log: `/configz`, `/flagz`, `/statusz` and
//! `/debug/flags/v`, as kube-proxy has them.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::Shared;
use crate::status::report::rfc3339;

/// What is in force.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Shown {
    /// As JSON, by API group.
    pub configz: String,
    /// By option.
    pub flags: BTreeMap<String, String>,
    /// Whether there are these pages.
    pub flagz: bool,
    pub statusz: bool,
}

/// Other pages that say something of the agent, as `/statusz` names them.
pub(super) const PATHS: [&str; 8] =
    ["/configz", "/flagz", "/frontends", "/healthz", "/livez", "/metrics", "/proxyMode", "/status"];

/// Has this much logged from now on, in `-v`'s numbers.
pub type SetVerbosity = Arc<dyn Fn(u32) -> Result<(), String> + Send + Sync>;

/// What a browser shall not take for anything else.
const NO_SNIFF: (HeaderName, &str) = (header::X_CONTENT_TYPE_OPTIONS, "nosniff");

/// The configuration in force, by API group.
pub(super) async fn configz(State(shared): State<Arc<Shared>>) -> Response {
    let text = shared.options.configuration.borrow().configz.clone();
    ([(header::CONTENT_TYPE, "application/json"), NO_SNIFF], text).into_response()
}

pub(super) async fn flagz(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    let Shown { flags, flagz, .. } = Shown::clone(&shared.options.configuration.borrow());
    if !flagz {
        return StatusCode::NOT_FOUND.into_response();
    }
    page("Flagz", &headers, json!({ "flags": flags }), || {
        flags.iter().fold(String::new(), |mut text, (flag, value)| {
            let _ = writeln!(text, "{flag}={value}");
            text
        })
    })
}

pub(super) async fn statusz(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    if !shared.options.configuration.borrow().statusz {
        return StatusCode::NOT_FOUND.into_response();
    }
    let started = shared.status().started;
    let up = SystemTime::now().duration_since(started).unwrap_or(Duration::ZERO).as_secs();
    let (started, version) = (rfc3339(started), env!("CARGO_PKG_VERSION"));
    // There is no Go, and the field is not optional.
    let json =
        json!({ "startTime": started, "uptimeSeconds": up, "goVersion": "", "binaryVersion": version, "paths": PATHS });
    page("Statusz", &headers, json, || {
        let (hours, minutes, seconds) = (up / 3600, up / 60 % 60, up % 60);
        format!(
            "\nStarted: {started}\nUp: {hours} hr {minutes:02} min {seconds:02} sec\nBinary version: {version}\nPaths: {}\n",
            PATHS.join(" ")
        )
    })
}

/// How a page is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Json,
    Yaml,
    Text,
}

/// Where several would do, the first is had.
const FORMS: [(Form, &str, &str); 3] =
    [(Form::Json, "application", "json"), (Form::Yaml, "application", "yaml"), (Form::Text, "text", "plain")];

const GROUP: &str = "config.k8s.io";
/// Those whose fields are the same.
const VERSIONS: [&str; 2] = ["v1beta1", DEPRECATED];
const DEPRECATED: &str = "v1alpha1";

/// One of what a client accepts.
struct Accepted<'a> {
    media: (&'a str, &'a str),
    quality: f64,
    parameters: BTreeMap<&'a str, &'a str>,
}

impl<'a> Accepted<'a> {
    /// `None`: it makes no sense, and is passed over.
    fn read(text: &'a str) -> Option<Self> {
        let mut parts = text.split(';');
        let first = parts.next()?.trim();
        let media = match first.split_once('/') {
            Some((kind, subtype)) if !subtype.is_empty() && !subtype.contains('/') => (kind.trim(), subtype.trim()),
            None if first == "*" => ("*", "*"),
            _ => return None,
        };
        let parameters = parts.filter_map(|part| part.split_once('='));
        let parameters = parameters.map(|(name, value)| (name.trim(), value.trim()));
        let mut parameters: BTreeMap<_, _> =
            parameters.filter(|(_, value)| !value.is_empty() && !value.contains('=')).collect();
        let quality = parameters.remove("q").map_or(1.0, |quality| quality.parse().unwrap_or(0.0));
        Some(Self { media, quality, parameters })
    }

    /// No order, for one that says more goes before a better one; but it is kube-proxy's.
    fn goes_before(&self, other: &Self) -> bool {
        let ((kind, subtype), (other_kind, other_subtype)) = (self.media, other.media);
        self.quality > other.quality || (kind != "*" && other_kind == "*") || (subtype != "*" && other_subtype == "*")
    }

    /// The version of the kind that is to be written so, and is none of a text. Others are had by who names the kind, its group and its version,
    /// so that nobody parses what may change.
    fn takes(&self, kind: &str, (form, of, subtype): (Form, &str, &str)) -> Option<&'static str> {
        let Self { media, quality: _, parameters } = self;
        let is_it = *media == (of, subtype) || *media == (of, "*") || *media == ("*", "*");
        if !is_it || ["stream", "sv"].iter().any(|parameter| parameters.contains_key(parameter)) {
            return None;
        }
        let [named, group, version] = ["as", "g", "v"].map(|parameter| parameters.get(parameter).copied());
        match form {
            Form::Text => named.or(group).or(version).is_none().then_some(""),
            Form::Json | Form::Yaml => {
                let wanted = VERSIONS.into_iter().find(|known| version == Some(*known));
                wanted.filter(|_| named == Some(kind) && group == Some(GROUP))
            }
        }
    }
}

/// What of all that is accepted is had, and in which version: as component-base's negotiation has it.
fn form(accept: &str, kind: &str) -> Option<(Form, &'static str)> {
    if accept.trim().is_empty() {
        return Some((Form::Text, ""));
    }
    let mut accepted: Vec<Accepted<'_>> = Vec::new();
    for next in accept.split(',').filter_map(Accepted::read) {
        let behind = accepted.iter().rposition(|before| !next.goes_before(before));
        accepted.insert(behind.map_or(0, |at| at + 1), next);
    }
    let had = |one: &Accepted<'_>| FORMS.into_iter().find_map(|form| Some((form.0, one.takes(kind, form)?)));
    accepted.iter().find_map(had)
}

fn page(kind: &str, headers: &HeaderMap, fields: Value, text: impl Fn() -> String) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let Some((form, version)) = form(accept, kind) else {
        return plain(
            StatusCode::NOT_ACCEPTABLE,
            &format!(
                "only text/plain, or application/json or application/yaml with ;v=v1beta1;g={GROUP};as={kind}, is to be had"
            ),
        );
    };
    let name = kind.to_lowercase();
    let mut object =
        json!({ "kind": kind, "apiVersion": format!("{GROUP}/{version}"), "metadata": { "name": "proxy-agent" } });
    if let (Value::Object(object), Value::Object(fields)) = (&mut object, fields) {
        object.extend(fields);
    }
    let (media, text) = match form {
        Form::Text => {
            let text = format!(
                "\nproxy-agent {name}\nWarning: This endpoint is not meant to be machine parseable, has no formatting compatibility \
                 guarantees and is for debugging purposes only.\n{}",
                text()
            );
            return ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response();
        }
        Form::Json => ("json", serde_json::to_string(&object).map_err(|error| error.to_string())),
        Form::Yaml => ("yaml", serde_saphyr::to_string(&object).map_err(|error| error.to_string())),
    };
    let text = match text {
        Ok(text) => text,
        Err(error) => return plain(StatusCode::INTERNAL_SERVER_ERROR, &error),
    };
    let media = format!("application/{media};g={GROUP};v={version};as={kind}");
    let mut answer = ([(header::CONTENT_TYPE, media)], text).into_response();
    if version == DEPRECATED
        && let Ok(warning) = HeaderValue::try_from(format!(
            "299 - \"This version of the {name} endpoint is deprecated. Please use a newer version.\""
        ))
    {
        answer.headers_mut().insert(header::WARNING, warning);
    }
    answer
}

/// `PUT`, with a number for a body. It lasts until it is set again, or the configuration has another.
pub(super) async fn verbosity(set: SetVerbosity, method: Method, body: String) -> Response {
    if method != Method::PUT {
        return plain(StatusCode::NOT_ACCEPTABLE, "unsupported http method");
    }
    // As Go reads it: digits alone, and no more than an int32.
    let digits = Some(&body).filter(|body| body.bytes().all(|byte| byte.is_ascii_digit()));
    let Some(number) = digits.and_then(|body| body.parse().ok()).filter(|number| i32::try_from(*number).is_ok()) else {
        return plain(StatusCode::BAD_REQUEST, &format!("{body:?} is no verbosity; send a whole number, 0 or more"));
    };
    match set(number) {
        // In component-base's words: scripts look for them.
        Ok(()) => plain(StatusCode::OK, &format!("successfully set klog.logging.verbosity to {number}")),
        Err(error) => plain(StatusCode::BAD_REQUEST, &error),
    }
}

fn plain(code: StatusCode, text: &str) -> Response {
    (code, [(header::CONTENT_TYPE, "text/plain"), NO_SNIFF], format!("{text}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As kube-proxy 1.36 answers.
    #[test]
    fn what_is_accepted_is_had_as_kube_proxy_has_it() {
        const JSON: &str = "application/json;v=v1beta1;g=config.k8s.io;as=Flagz";
        let (text, json, yaml) = (Some((Form::Text, "")), Some((Form::Json, "v1beta1")), Some((Form::Yaml, "v1beta1")));
        for (accept, wanted) in [
            ("", text),
            (" ", text),
            ("*/*", text),
            ("*", text),
            ("text/*", text),
            ("text/plain;version=0.0.4", text),
            ("text/html, text/plain;q=0.5", text),
            (JSON, json),
            ("application/json; g=config.k8s.io; as=Flagz; v=v1beta1, */*", json),
            ("application/yaml;v=v1beta1;g=config.k8s.io;as=Flagz", yaml),
            ("application/json;v=v1alpha1;g=config.k8s.io;as=Flagz", Some((Form::Json, "v1alpha1"))),
            // Whoever names it gets it by any name of the form.
            ("*/*;v=v1beta1;g=config.k8s.io;as=Flagz", json),
            ("application/*;v=v1beta1;g=config.k8s.io;as=Flagz", json),
            // The better one first, and the one that says more.
            (&format!("text/plain;q=0.5,{JSON}"), json),
            (&format!("{JSON};q=0.5,text/plain"), text),
            (&format!("*/*,{JSON};q=0.1"), json),
            (&format!("{JSON};q=x,text/plain;q=0.1"), text),
            (&format!("text/plain;q=0.1,{JSON};q=0"), text),
            ("application/json;v=foo;g=config.k8s.io;as=Flagz,*/*", text),
            // Neither a version nor a kind that there is not, nor half a name.
            ("application/json;v=v1;g=config.k8s.io;as=Flagz, text/plain", text),
            ("application/json;v=v1beta1;g=config.k8s.io;as=Statusz", None),
            ("application/json;v=v1beta1;g=config.k8s.io", None),
            ("application/json", None),
            ("application/xml", None),
            ("text", None),
            ("text/plain;as=Flagz", None),
            (&format!("{JSON};stream=watch"), None),
            (&format!("{JSON};sv=v1"), None),
            ("application/cbor;v=v1beta1;g=config.k8s.io;as=Flagz", None),
        ] {
            assert_eq!(form(accept, "Flagz"), wanted, "{accept}");
        }
    }
}
