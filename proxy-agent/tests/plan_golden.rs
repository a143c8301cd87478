//! YAML in, text out: what would be programmed for files that an operator might write.

use std::{fmt::Write, path::Path, time::Duration};

use proxy_agent::{
    model::{Event, SourceState, index::Index},
    plan::{Defaults, Dump, Planner},
    source::{self, Input},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// The plan of all files below `dir` for one node, as text.
async fn plan(dir: &Path, node: &str) -> String {
    let (events, mut received) = mpsc::channel(1024);
    let (state, mut synced) = watch::channel(SourceState::Listing { missing: Vec::new() });
    let options = source::Options { node: node.into(), pods: false, input: Input::Directory(dir.to_owned()) };
    let cancel = CancellationToken::new();
    let reading = tokio::spawn(source::run(options, events, state, cancel.clone()));
    tokio::time::timeout(Duration::from_secs(10), synced.wait_for(|state| *state == SourceState::Synced))
        .await
        .expect("read in time")
        .expect("the source runs");
    let mut index = Index::default();
    while let Ok(event) = received.try_recv() {
        index.apply(event, &mut Default::default());
    }
    cancel.cancel();
    reading.await.unwrap().unwrap();

    // An address of each family, localhost, and what is on a CNI's bridge.
    let own = ["127.0.0.1", "192.0.2.1", "10.244.1.254", "2001:db8::1", "fe80::1"];
    index.apply(Event::Addresses(own.iter().map(|ip| ip.parse().unwrap()).collect()), &mut Default::default());

    let mut planner = Planner::new(Defaults::default());
    let mut text = Dump(planner.full(index.snapshot())).to_string();
    let mut problems = planner.problems();
    problems.extend(index.problems());
    for (object, problems) in problems {
        for problem in problems {
            writeln!(text, "problem {object}: {problem}").unwrap();
        }
    }
    text
}

async fn golden(name: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = format!("{name}.yaml");
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(&file);
    std::fs::copy(from, dir.path().join(file)).unwrap();
    plan(dir.path(), "node1").await
}

#[tokio::test]
async fn conflict() {
    insta::assert_snapshot!(golden("conflict").await);
}

#[tokio::test]
async fn endpoints() {
    insta::assert_snapshot!(golden("endpoints").await);
}

#[tokio::test]
async fn outside() {
    insta::assert_snapshot!(golden("outside").await);
}

#[tokio::test]
async fn policies() {
    insta::assert_snapshot!(golden("policies").await);
}

/// The examples that `cargo xtask run` starts from are understood whole.
#[tokio::test]
async fn examples() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let text = plan(&dir, "node1").await;
    assert!(text.contains("ClusterIP default/web:http") && !text.contains("problem"), "{text}");
}
