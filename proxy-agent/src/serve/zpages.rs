//! What Kubernetes' components say of themselves at their metrics address, and how much they log: `/configz`, `/flagz`, `/statusz` and
//! `/debug/flags/v`, as kube-proxy has them.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderName, Method, StatusCode, header},
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

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Text,
    Json,
}

/// The first of what is accepted that is to be had. JSON is had by who names the kind and its version, so that nobody parses what may change.
fn form(accept: &str, kind: &str) -> Option<Form> {
    if accept.trim().is_empty() {
        return Some(Form::Text);
    }
    accept.split(',').find_map(|one| {
        let mut parts = one.split(';').map(str::trim);
        let media = parts.next()?;
        let has = |wanted: &str| one.split(';').any(|part| part.trim() == wanted);
        match media {
            "text/plain" | "text/*" | "*/*" => Some(Form::Text),
            "application/json" if has("g=config.k8s.io") && has("v=v1beta1") && has(&format!("as={kind}")) => {
                Some(Form::Json)
            }
            _ => None,
        }
    })
}

fn page(kind: &str, headers: &HeaderMap, fields: Value, text: impl Fn() -> String) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    match form(accept, kind) {
        Some(Form::Text) => {
            let name = kind.to_lowercase();
            let text = format!(
                "\nproxy-agent {name}\nWarning: This endpoint is not meant to be machine parseable, has no formatting compatibility \
                 guarantees and is for debugging purposes only.\n{}",
                text()
            );
            ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()
        }
        Some(Form::Json) => {
            let mut object =
                json!({ "kind": kind, "apiVersion": "config.k8s.io/v1beta1", "metadata": { "name": "proxy-agent" } });
            if let (Value::Object(object), Value::Object(fields)) = (&mut object, fields) {
                object.extend(fields);
            }
            Json(object).into_response()
        }
        None => plain(
            StatusCode::NOT_ACCEPTABLE,
            &format!("only text/plain, or application/json;v=v1beta1;g=config.k8s.io;as={kind}, is to be had"),
        ),
    }
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

    #[test]
    fn json_is_for_who_names_what_it_is() {
        for (accept, kind, wanted) in [
            ("", "Flagz", Some(Form::Text)),
            ("*/*", "Flagz", Some(Form::Text)),
            ("text/html, text/plain;q=0.5", "Flagz", Some(Form::Text)),
            ("application/json;v=v1beta1;g=config.k8s.io;as=Flagz", "Flagz", Some(Form::Json)),
            ("application/json; g=config.k8s.io; as=Statusz; v=v1beta1, */*", "Statusz", Some(Form::Json)),
            ("application/json;v=v1beta1;g=config.k8s.io;as=Statusz", "Flagz", None),
            ("application/json;v=v1;g=config.k8s.io;as=Flagz, text/plain", "Flagz", Some(Form::Text)),
            ("application/json", "Flagz", None),
        ] {
            assert_eq!(form(accept, kind), wanted, "{accept}");
        }
    }
}
