//! A Kubernetes API server as a source.
//!
//! Kinds are followed independently, each by its own list and watch ([`follow()`]): Services, EndpointSlices, and the own
//! Node; if they are asked for, the own Node's Pods and Namespaces. Nothing is kept of them here; what is read is slimmed and handed on.
//! What they share is the [`Board`], which makes one [`SourceState`] of how they stand.

mod board;
mod connect;
mod decode;
mod follow;
mod kinds;
mod meter;
mod pods;
mod remarks;
mod tell;

use std::sync::Arc;

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

pub(super) use self::tell::tell;
use self::{
    board::Board,
    connect::Connector,
    follow::{Follower, follow},
    kinds::{OwnNode, Services, Slices},
    pods::{Namespaces, Pods},
};
use super::{KubernetesOptions, SourceError};
use crate::model::{Event, SourceState};

/// Whether there is a configuration by which a client can be made.
pub(super) async fn check(options: &KubernetesOptions) -> Result<(), SourceError> {
    connect::config(options).await.map(drop)
}

pub(super) async fn run(
    node: &str,
    pods: bool,
    options: KubernetesOptions,
    events: mpsc::Sender<Event>,
    state: watch::Sender<SourceState>,
    cancel: &CancellationToken,
) -> Result<(), SourceError> {
    let watch_timeout = options.watch_timeout;
    let follower = Follower {
        connector: Arc::new(Connector::new(options).await?),
        board: Arc::new(Board::new(state)),
        events: events.clone(),
        problems: Arc::default(),
        watch_timeout,
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(follow(Services::default(), follower.clone()));
    tasks.spawn(follow(Slices::default(), follower.clone()));
    if pods {
        tasks.spawn(follow(Pods::new(node), follower.clone()));
        tasks.spawn(follow(Namespaces::default(), follower.clone()));
    }
    tasks.spawn(follow(OwnNode::new(node), follower));
    tokio::select! {
        () = cancel.cancelled() => Ok(()),
        () = events.closed() => Ok(()),
        // Followers end only when nobody listens; anything else is a fault of ours that must not pass for silence.
        ended = tasks.join_next() => match ended {
            Some(Err(error)) => Err(SourceError::Ended(error.to_string())),
            _ => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests;
