//! Hooks that somebody took off, and others' programs in front of ours: what the status says of them.

use std::{collections::BTreeSet, sync::Arc};

use super::table::Table;
use crate::dataplane::{Ahead, Hook};

/// Notes which of the hooks that were in force are `missing`, by name; whether there are any. XDP is a short cut: without it tc serves.
pub(super) fn note(table: &mut Table, missing: &[String]) -> bool {
    let missing: BTreeSet<&String> = missing.iter().collect();
    let status = &table.next;
    let is_missing = |hook: &Hook| missing.contains(&hook.name()) && !hook.kind.starts_with("xdp/");
    let (lost, hooks): (Vec<Hook>, Vec<Hook>) = status.hooks.iter().cloned().partition(is_missing);
    let is_new = !lost.is_empty();
    if is_new {
        let status = table.edit();
        status.hooks_lost += lost.len() as u64;
        // What is found again to be missing was taken off once.
        status.hooks = Arc::new(hooks);
        status.lost_hooks = Arc::new([&**status.lost_hooks, &*lost].concat());
    }
    is_new
}

/// Those that were put back are lost no more, nor are those of devices that are gone.
pub(super) fn look_after(table: &mut Table) {
    let status = &table.next;
    let in_force: BTreeSet<String> =
        if status.lost_hooks.is_empty() { BTreeSet::new() } else { status.hooks.iter().map(Hook::name).collect() };
    let is_there = |target: &String| status.devices.values().any(|device| device.name == *target);
    let is_lost = |hook: &&Hook| {
        let on_device = hook.kind.starts_with("tcx/") || hook.kind.starts_with("clsact/");
        !in_force.contains(&hook.name()) && (!on_device || is_there(&hook.target))
    };
    let lost: Vec<Hook> = status.lost_hooks.iter().filter(is_lost).cloned().collect();
    if lost != *status.lost_hooks {
        table.edit().lost_hooks = Arc::new(lost);
    }
}

pub(super) fn note_ahead(table: &mut Table, ahead: Vec<Ahead>) {
    if *table.next.ahead != ahead {
        for Ahead { kind, target, programs } in &ahead {
            let known = table.next.ahead.iter().find(|known| known.kind == *kind && known.target == *target);
            let is_new = |id: &&u32| known.is_none_or(|known| !known.programs.contains(id));
            let programs: Vec<&u32> = programs.iter().filter(is_new).collect();
            if !programs.is_empty() {
                tracing::warn!(
                    hook = kind,
                    device = target,
                    ?programs,
                    "others' programs run before ours, and may keep packets from it"
                );
            }
        }
        table.edit().ahead = Arc::new(ahead);
    }
}
