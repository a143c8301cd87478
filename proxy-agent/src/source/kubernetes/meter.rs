//! Counts what the client asks of the API server: every request, with how it ended and how long that took.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::http::{Request, Response};
use tower::{Layer, Service};

use crate::status::requests::Requests;

/// Goes round all that the client does with a request.
#[derive(Clone)]
pub(super) struct Meter {
    pub(super) requests: Arc<Requests>,
    /// Of the API server; the client adds it to a request only later.
    pub(super) host: String,
}

impl<S> Layer<S> for Meter {
    type Service = Metered<S>;

    fn layer(&self, inner: S) -> Metered<S> {
        Metered { inner, meter: self.clone() }
    }
}

pub(super) struct Metered<S> {
    inner: S,
    meter: Meter,
}

impl<S, B, R> Service<Request<B>> for Metered<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let mut pending = Pending {
            meter: self.meter.clone(),
            method: request.method().to_string(),
            is_watch: request.uri().query().is_some_and(|query| query.split('&').any(|part| part == "watch=true")),
            began: Instant::now(),
            code: None,
        };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            pending.ended(answer.as_ref().ok().map(|answer| answer.status().as_u16()));
            answer
        })
    }
}

/// Counted once it is over, also where nobody waited for its end.
struct Pending {
    meter: Meter,
    method: String,
    is_watch: bool,
    began: Instant,
    code: Option<u16>,
}

impl Pending {
    fn ended(&mut self, code: Option<u16>) {
        self.code = code;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Self { meter: Meter { requests, host }, method, is_watch, began, code } = self;
        requests.count(method, host, *code, (!*is_watch).then(|| began.elapsed()));
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, future::pending, time::Duration};

    use super::*;

    /// Answers with the status that the path names; to `/never` not at all.
    struct Server;

    impl Service<Request<()>> for Server {
        type Response = Response<()>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Response<()>, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<()>) -> Self::Future {
            let code = request.uri().path().trim_start_matches('/').parse::<u16>();
            Box::pin(async move {
                match code {
                    Ok(code) => Ok(Response::builder().status(code).body(()).unwrap()),
                    Err(_) => pending().await,
                }
            })
        }
    }

    #[tokio::test]
    async fn every_request_is_counted_by_how_it_ended() {
        let requests = Arc::<Requests>::default();
        let mut service = Meter { requests: Arc::clone(&requests), host: "api:6443".into() }.layer(Server);
        for path in ["/200", "/200?limit=5&watch=true", "/403", "/never"] {
            let call = service.call(Request::builder().uri(path).body(()).unwrap());
            let _ = tokio::time::timeout(Duration::from_millis(20), call).await;
        }
        let counts = requests.counts();
        let results: Vec<_> = counts
            .results
            .iter()
            .map(|((code, method, host), n)| (code.as_str(), method.as_str(), host.as_str(), *n))
            .collect();
        assert_eq!(
            results,
            [("200", "GET", "api:6443", 2), ("403", "GET", "api:6443", 1), ("<error>", "GET", "api:6443", 1)]
        );
        let durations: Vec<_> = counts.durations.values().map(|values| values.count()).collect();
        assert_eq!(durations, [3], "a watch lasts as long as it is let");
    }
}
