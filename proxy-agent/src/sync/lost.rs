//! Hooks that somebody took off, and others' programs in front of ours: what the status says of them.

use std::sync::Arc;

use super::table::Table;
use crate::dataplane::{Ahead, Hook};

/// Notes which of the hooks that were in force are `missing`, by name. XDP is a short cut: without it tc serves.
pub(super) fn note(table: &mut Table, missing: &[String]) {
    let status = &table.next;
    let is_missing = |hook: &&Hook| missing.contains(&hook.name()) && !hook.kind.starts_with("xdp/");
    let newly: Vec<Hook> = status.hooks.iter().filter(is_missing).cloned().collect();
    let known = status.lost_hooks.iter().filter(|hook| is_missing(hook) && !newly.contains(hook)).cloned();
    let lost: Vec<Hook> = newly.iter().cloned().chain(known).collect();
    if lost != *status.lost_hooks || !newly.is_empty() {
        let status = table.edit();
        status.hooks_lost += newly.len() as u64;
        status.lost_hooks = Arc::new(lost);
    }
}

/// Those that were put back are lost no more, nor are those of devices that are gone.
pub(super) fn look_after(table: &mut Table) {
    let status = &table.next;
    let is_there = |target: &String| status.devices.values().any(|device| device.name == *target);
    let is_lost = |hook: &&Hook| {
        let on_device = hook.kind.starts_with("tcx/") || hook.kind.starts_with("clsact/");
        !status.hooks.contains(hook) && (!on_device || is_there(&hook.target))
    };
    let lost: Vec<Hook> = status.lost_hooks.iter().filter(is_lost).cloned().collect();
    if lost != *status.lost_hooks {
        table.edit().lost_hooks = Arc::new(lost);
    }
}

pub(super) fn note_ahead(table: &mut Table, ahead: Vec<Ahead>) {
    if *table.next.ahead != ahead {
        for Ahead { kind, target, programs } in &ahead {
            tracing::warn!(
                hook = kind,
                device = target,
                ?programs,
                "others' programs run before ours, and may keep packets from it"
            );
        }
        table.edit().ahead = Arc::new(ahead);
    }
}
