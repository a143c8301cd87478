//! List, then watch, then watch again: one kind.
//!
//! kube's own `watcher` does the same but keeps to itself what the agent must know: that a watch stands again after it was lost
//! (it says nothing until an object changes, so an agent would call itself stale for hours), and which object of the stream or of
//! a list could not be read (of a list it loses all for the sake of one). It also asks again at once, and for ever, where a server
//! ends every watch as it begins. So the loop is ours; requests, streams and types are kube's.
//!
//! - INVARIANT: nothing is ever said to be gone because of an error. Objects go by a DELETED event, or by being absent from a
//!   *complete* list.
//! - A lost connection goes on from the last version seen (bookmarks included), so nothing is listed again without need.
//! - A server that says the version is too old (410), an error inside the stream, and text that makes no sense lead to a new list.
//! - An object that cannot be read keeps its last good state and is named in `problems`; the others do not notice.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{AsyncBufReadExt, StreamExt};
use kube::{api::ListParams, core::Request};
use tokio::{
    sync::{Mutex, mpsc},
    time::timeout,
};
use tracing::debug;

use super::{
    board::{self, Board},
    connect::{Connector, reason},
    decode::{self, Object, Page, Told, Unreadable},
    kinds::{Kind, Selectors},
    remarks::Remarks,
};
use crate::{
    model::{Event, Teller},
    source::api,
};

/// A page of a list, whole.
const PAGE: Duration = Duration::from_secs(45);
/// The beginning of an answer to a watch, which a server gives at once.
const ANSWER: Duration = Duration::from_secs(15);
/// The server ends a watch when its time is up; a connection still silent so much later is dead.
const GRACE: Duration = Duration::from_secs(5);
/// A watch that lasted this long, or told anything, was a good one: failures before it are forgiven.
const LASTED: Duration = Duration::from_secs(5);
/// Watches follow each other at least so far apart.
const PACE: Duration = Duration::from_millis(100);
const FIRST_DELAY: Duration = Duration::from_millis(250);
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// By object.
type Problems = BTreeMap<String, Vec<String>>;

/// What the followers of all kinds share.
#[derive(Clone)]
pub(super) struct Follower {
    pub(super) connector: Arc<Connector>,
    pub(super) board: Arc<Board>,
    pub(super) events: mpsc::Sender<Event>,
    /// What each kind's objects have wrong with them, as it was handed on; held while it is, so that the last word is the newest.
    pub(super) problems: Arc<Mutex<[Problems; board::KINDS]>>,
    pub(super) watch_timeout: Duration,
}

/// Why a list or a watch ended without doing its work.
enum Trouble {
    /// The version, or the list's continuation, is too old by now (410).
    Gone,
    Failed {
        why: String,
        /// The credentials may have been replaced.
        renew: bool,
        /// What was seen of the stream cannot be relied upon.
        relist: bool,
    },
    /// The selector for fields is not known there (400).
    Fields,
    /// Nobody listens any more.
    Deaf,
}

impl Trouble {
    fn of(error: &kube::Error, selectors: &Selectors, resource: &str) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 410 => Self::Gone,
            kube::Error::Api(status) if status.code == 400 && selectors.fields_optional => Self::Fields,
            kube::Error::Api(status) => {
                Self::Failed { why: reason(error, resource), renew: status.code == 401, relist: false }
            }
            kube::Error::SerdeError(_) => Self::Failed { why: reason(error, resource), renew: false, relist: true },
            // A server behind new certificates, or one that no longer takes ours, cannot be reached either.
            _ => Self::Failed { why: reason(error, resource), renew: true, relist: false },
        }
    }

    /// Something of the stream was lost.
    fn in_stream(self) -> Self {
        match self {
            Self::Failed { why, renew, relist: _ } => Self::Failed { why, renew, relist: true },
            trouble => trouble,
        }
    }

    fn silent(resource: &str, after: Duration) -> Self {
        let why = format!("the API server does not answer for {resource} within {} s", after.as_secs());
        Self::Failed { why, renew: false, relist: false }
    }
}

/// Follows one kind until nobody listens.
pub(super) async fn follow<K: Kind>(mut kind: K, follower: Follower) {
    let mut selectors = kind.selectors();
    let mut version: Option<String> = None;
    let mut delays = Delays::default();
    loop {
        let began = Instant::now();
        let mut told = false;
        let outcome = match &mut version {
            None => match list(&mut kind, &selectors, &follower).await {
                Ok(listed) => {
                    version = Some(listed);
                    continue;
                }
                Err(trouble) => {
                    kind.list_lost();
                    Err(trouble)
                }
            },
            Some(version) => watch(&mut kind, &selectors, &follower, version, &mut told).await,
        };
        let good = told || (outcome.is_ok() && began.elapsed() >= LASTED);
        if good {
            delays.reset();
        }
        let delay = match outcome {
            Ok(()) if good => PACE.saturating_sub(began.elapsed()),
            Ok(()) => delays.next(),
            Err(Trouble::Gone) => {
                debug!(resource = K::RESOURCE, "version too old, listing again");
                version = None;
                delays.next()
            }
            Err(Trouble::Fields) => {
                debug!(resource = K::RESOURCE, fields = selectors.fields, "the API server knows no such selector");
                selectors.fields = None;
                selectors.fields_optional = false;
                continue;
            }
            Err(Trouble::Failed { why, renew, relist }) => {
                follower.board.failing(K::KIND, why);
                if relist {
                    version = None;
                }
                if renew {
                    follower.connector.renew().await;
                }
                delays.next()
            }
            Err(Trouble::Deaf) => return,
        };
        tokio::time::sleep(delay).await;
    }
}

/// Lists all of it, a page at a time, and hands the whole on; returns its version.
async fn list<K: Kind>(kind: &mut K, selectors: &Selectors, follower: &Follower) -> Result<String, Trouble> {
    let trouble = |error: &kube::Error| Trouble::of(error, selectors, K::RESOURCE);
    let mut parameters = ListParams {
        label_selector: selectors.labels.clone(),
        field_selector: selectors.fields.clone(),
        limit: Some(K::PAGE),
        ..ListParams::default()
    };
    let client = follower.connector.client().await;
    let version = loop {
        let request =
            Request::new(K::PATH).list(&parameters).map_err(|error| trouble(&kube::Error::BuildRequest(error)))?;
        let answer = timeout(PAGE, client.request_text(request)).await;
        let text = answer.map_err(|_| Trouble::silent(K::RESOURCE, PAGE))?.map_err(|error| trouble(&error))?;
        let Page { version, next, objects } =
            decode::page::<K::Object>(&text).map_err(|error| trouble(&kube::Error::SerdeError(error)))?;
        for object in objects {
            match object {
                Object::Whole(object) => kind.listed(object),
                Object::Unreadable(object) => kind.listed_unreadable(object),
            }
        }
        if next.is_empty() {
            break version;
        }
        parameters.continue_token = Some(next);
    };
    if version.is_empty() {
        let why = format!("the API server's list of {} carries no version", K::RESOURCE);
        return Err(Trouble::Failed { why, renew: false, relist: true });
    }
    for event in kind.list_done() {
        follower.send(Some(event)).await?;
    }
    follower.report(K::KIND, kind.remarks()).await?;
    follower.board.good(K::KIND, kind.missing());
    Ok(version)
}

/// Watches from `version` on, and moves it along, until the stream ends. `told`: it said something.
async fn watch<K: Kind>(
    kind: &mut K,
    selectors: &Selectors,
    follower: &Follower,
    version: &mut String,
    told: &mut bool,
) -> Result<(), Trouble> {
    let trouble = |error: &kube::Error| Trouble::of(error, selectors, K::RESOURCE);
    // Agents that started together should not all come back in the same second.
    let lasts = follower.watch_timeout.mul_f64(1.0 + random() / 4.0);
    let mut request = Request::new(K::PATH)
        .watch(&selectors.watch(lasts), version)
        .map_err(|error| trouble(&kube::Error::BuildRequest(error)))?;
    let client = follower.connector.client().await;
    // From 1.37 on servers compress each event by itself, of which kube's client reads only the first.
    if let Ok(identity) = "identity".parse() {
        request.headers_mut().insert("accept-encoding", identity);
    }
    let answer = timeout(ANSWER, client.request_stream(request)).await;
    let stream = answer.map_err(|_| Trouble::silent(K::RESOURCE, ANSWER))?.map_err(|error| trouble(&error))?;
    let mut lines = std::pin::pin!(stream.lines());
    follower.board.good(K::KIND, kind.missing());
    loop {
        let Ok(next) = timeout(lasts + GRACE, lines.next()).await else {
            debug!(resource = K::RESOURCE, "the watch fell silent, starting another");
            return Ok(());
        };
        let line = match next {
            None => return Ok(()),
            // Connections break. If there is more to it, the next one does not come about and says so.
            Some(Err(error)) => {
                debug!(resource = K::RESOURCE, %error, "the watch broke off");
                return Ok(());
            }
            Some(Ok(line)) => line,
        };
        let heard = match decode::line::<K::Object>(&line) {
            Ok(Some(heard)) => heard,
            Ok(None) => continue,
            Err(error) => return Err(trouble(&error).in_stream()),
        };
        let event = match heard {
            Told::Applied(Object::Whole(object)) => {
                advance(version, K::metadata(&object))?;
                kind.applied(object)
            }
            Told::Deleted(Object::Whole(object)) => {
                advance(version, K::metadata(&object))?;
                kind.deleted(K::metadata(&object))
            }
            Told::Applied(Object::Unreadable(object)) => {
                advance(version, &named(&object))?;
                kind.applied_unreadable(object)
            }
            Told::Deleted(Object::Unreadable(object)) => {
                let metadata = named(&object);
                advance(version, &metadata)?;
                kind.deleted(&metadata)
            }
            Told::Bookmark(bookmark) => {
                advance(version, &api::Metadata { resource_version: bookmark, ..api::Metadata::default() })?;
                None
            }
            Told::Error(status) => return Err(trouble(&kube::Error::Api(status)).in_stream()),
        };
        *told = true;
        follower.send(event).await?;
        follower.report(K::KIND, kind.remarks()).await?;
        follower.board.good(K::KIND, kind.missing());
    }
}

/// Every line moves the watch along, whether its object can be read or not, unless it does not say whereto.
fn advance(version: &mut String, metadata: &api::Metadata) -> Result<(), Trouble> {
    let api::Metadata { namespace, name, resource_version, .. } = metadata;
    if resource_version.is_empty() {
        let why = format!("the object {namespace}/{name} of the API server's stream carries no version");
        return Err(Trouble::Failed { why, renew: false, relist: true });
    }
    version.clone_from(resource_version);
    Ok(())
}

fn named(object: &Unreadable) -> api::Metadata {
    let Unreadable { namespace, name, resource_version, service: _, why: _ } = object;
    api::Metadata {
        namespace: namespace.clone(),
        name: name.clone(),
        resource_version: resource_version.clone(),
        ..api::Metadata::default()
    }
}

impl Follower {
    /// Hands on what is wrong with objects of this kind, if that is news.
    async fn report(&self, kind: board::Kind, remarks: &mut Remarks) -> Result<(), Trouble> {
        let Some(news) = remarks.news() else { return Ok(()) };
        let mut problems = self.problems.lock().await;
        *kind.of(&mut problems) = news;
        let all = problems.iter().flatten().map(|(object, why)| (object.clone(), why.clone())).collect();
        self.send(Some(Event::Problems(Teller::Source, all))).await
    }

    async fn send(&self, event: Option<Event>) -> Result<(), Trouble> {
        match event {
            Some(event) => self.events.send(event).await.map_err(|_| Trouble::Deaf),
            None => Ok(()),
        }
    }
}

/// How long to wait before trying again: twice as long each time, never quite the same.
#[derive(Default)]
struct Delays {
    failures: u32,
}

impl Delays {
    fn next(&mut self) -> Duration {
        let longest = FIRST_DELAY.saturating_mul(1 << self.failures.min(16)).min(LONGEST_DELAY);
        self.failures += 1;
        longest.mul_f64(0.5 + random() / 2.0)
    }

    fn reset(&mut self) {
        self.failures = 0;
    }
}

/// From 0 up to 1; good enough to spread requests.
fn random() -> f64 {
    let number = RandomState::new().hash_one(0_u8);
    f64::from(u32::try_from(number >> 32).unwrap_or_default()) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_bound() {
        let mut delays = Delays::default();
        for round in 0..100 {
            let delay = delays.next();
            let longest = Duration::from_millis(250 << round.min(10)).min(LONGEST_DELAY);
            assert!(delay >= longest / 2 && delay <= longest, "{round}: {delay:?}");
        }
        delays.reset();
        assert!(delays.next() <= FIRST_DELAY);
    }

    #[test]
    fn random_is_spread() {
        let numbers: Vec<f64> = (0..1000).map(|_| random()).collect();
        assert!(numbers.iter().all(|number| (0.0..=1.0).contains(number)));
        assert!(numbers.iter().any(|number| *number < 0.1) && numbers.iter().any(|number| *number > 0.9));
    }
}
