//! What Kubernetes' components say of themselves at their metrics address, and how much they log: `/configz` and `/debug/flags/v`, as kube-proxy
//! has them.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderName, Method, StatusCode, header},
    response::{IntoResponse, Response},
};

use super::Shared;

/// Has this much logged from now on, in `-v`'s numbers.
pub type SetVerbosity = Arc<dyn Fn(u32) -> Result<(), String> + Send + Sync>;

/// What a browser shall not take for anything else.
const NO_SNIFF: (HeaderName, &str) = (header::X_CONTENT_TYPE_OPTIONS, "nosniff");

/// The configuration in force, by API group.
pub(super) async fn configz(State(shared): State<Arc<Shared>>) -> Response {
    let text = shared.options.configuration.borrow().to_string();
    ([(header::CONTENT_TYPE, "application/json"), NO_SNIFF], text).into_response()
}

/// `PUT`, with a number for a body. It lasts until it is set again, or the configuration has another.
pub(super) async fn verbosity(set: SetVerbosity, method: Method, body: String) -> Response {
    if method != Method::PUT {
        return plain(StatusCode::NOT_ACCEPTABLE, "unsupported http method");
    }
    let Ok(number) = body.trim().parse::<u32>() else {
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
