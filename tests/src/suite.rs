//! Runs cases one after the other, says how each went, and counts.
//!
//! Cases share a world, so they run in the order they are written, in one process, and one that fails does not stop the
//! others. A skip is printed with its reason and counted as a skip, never as a pass.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use anyhow::Result;

use crate::world::{AgentOptions, Fallback, Programs, SocketLb, World, cleanup_on_signals};

/// Outcome counts of one test binary. `cargo xtask test` reads what it prints.
pub struct Suite {
    name: &'static str,
    only: Vec<String>,
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
    started: Instant,
}

impl Suite {
    /// Arguments that are no options choose cases by a part of their name, as with `cargo test`.
    pub fn new(name: &'static str) -> Self {
        let only = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
        Self { name, only, passed: 0, failed: Vec::new(), skipped: 0, started: Instant::now() }
    }

    /// A suite whose cases need worlds: for each shape of which any case is to run it makes one, and runs the cases in it.
    pub fn in_worlds<S>(
        name: &'static str,
        shapes: impl IntoIterator<Item = (String, S)>,
        prepare: impl Fn(Programs, &S) -> Result<World>,
        cases: impl Fn(&mut Self, &str, &S, &mut World),
    ) -> ExitCode {
        let mut suite = Self::new(name);
        let Some(programs) = suite.programs() else { return suite.finish() };
        if let Err(error) = cleanup_on_signals().and_then(|()| World::sweep().map(drop)) {
            suite.fail("preparation", &error);
            return suite.finish();
        }
        for (group, shape) in shapes {
            if !suite.wants_group(&group) {
                continue;
            }
            match prepare(programs.clone(), &shape) {
                Ok(mut world) => cases(&mut suite, &group, &shape, &mut world),
                Err(error) => suite.fail(&group, &error),
            }
        }
        suite.finish()
    }

    /// The shapes of suites that hold for pods translated at connect time and per packet alike.
    pub fn both_ways(name: &str) -> [(String, SocketLb); 2] {
        SocketLb::SERVING.map(|socket_lb| (format!("{name}/{}", socket_lb.name()), socket_lb))
    }

    /// The same, and the dataplanes in place of eBPF.
    pub fn every_way(name: &str) -> Vec<(String, AgentOptions)> {
        let ebpf = Self::both_ways(name).map(|(group, socket_lb)| (group, AgentOptions::new(socket_lb)));
        let others = Fallback::ALL.map(|by| (format!("{name}/{}", by.name()), AgentOptions::by(by)));
        ebpf.into_iter().chain(others).collect()
    }

    /// Whether any of the cases called `<group>/…` may run: a world that nobody needs is not built.
    pub fn wants_group(&self, group: &str) -> bool {
        let near = |only: &String| {
            // `routed/all` and `routed/all/a case` ask for the group; so does any text that may be in a case's name only.
            group.contains(only.as_str()) || only.starts_with(group) || !only.contains('/')
        };
        self.only.is_empty() || self.only.iter().any(near)
    }

    /// Whether the case of this name is to run.
    pub fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| name.contains(only.as_str()))
    }

    /// Whether cases are chosen by a text that has `part` in it.
    pub fn names(&self, part: &str) -> bool {
        self.only.iter().any(|only| only.contains(part))
    }

    /// Runs one case; a panic in it is its failure.
    pub fn case(&mut self, name: &str, case: impl FnOnce() -> Result<()>) {
        if !self.wants(name) {
            return;
        }
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(case)).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "panic".to_owned());
            Err(anyhow::anyhow!("panic: {text}"))
        });
        match outcome {
            Ok(()) => {
                self.passed += 1;
                println!("ok   {name} ({} ms)", started.elapsed().as_millis());
            }
            Err(error) => self.fail_since(name, &error, started),
        }
    }

    /// Something that the cases need failed: a failure under this name.
    pub fn fail(&mut self, name: &str, error: &anyhow::Error) {
        self.fail_since(name, error, Instant::now());
    }

    fn fail_since(&mut self, name: &str, error: &anyhow::Error, since: Instant) {
        crate::world::wait_if_ending();
        println!("FAIL {name} ({} ms): {error:#}", since.elapsed().as_millis());
        self.failed.push(name.to_owned());
    }

    /// The programs that run in worlds. What the machine lacks is a skip; programs that were not built are a failure, since whoever
    /// runs the suites has to build them.
    pub fn programs(&mut self) -> Option<Programs> {
        if let Some(reason) = World::unavailable() {
            self.skip(self.name, &reason);
            return None;
        }
        Programs::find().map_err(|error| self.fail("the programs to test", &error)).ok()
    }

    pub fn skip(&mut self, name: &str, reason: &str) {
        self.skipped += 1;
        println!("SKIP {name}: {reason}");
    }

    /// Nothing failed so far.
    pub fn is_clean(&self) -> bool {
        self.failed.is_empty()
    }

    /// Prints the counts; success only if nothing failed.
    pub fn finish(self) -> ExitCode {
        let Self { name, only: _, passed, failed, skipped, started } = self;
        println!(
            "suite {name}: {passed} passed, {} failed, {skipped} skipped in {:.1} s",
            failed.len(),
            started.elapsed().as_secs_f64()
        );
        if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
