//! The programs: which there are, loaded or taken up from their pins.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use aya::{EbpfLoader, programs::Program as AyaProgram};

use super::{globals::Globals, links::list};
use crate::dataplane::{
    DataplaneError,
    ebpf::{
        SocketLb, Xdp, clsact::Direction, kernel, layout::MapName, log, object::Digest, pins::Layout, sys, unavailable,
    },
};

/// Connect-time programs and their attach types (`enum bpf_attach_type`).
pub(crate) const CGROUP_PROGRAMS: [(&str, u32); 8] = [
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
];

/// Per-packet programs.
const TC_PROGRAMS: [&str; 4] = ["tc_ingress_ether", "tc_egress_ether", "tc_ingress_l3", "tc_egress_l3"];

pub(super) const fn tc_program(direction: Direction, ethernet: bool) -> &'static str {
    match (direction, ethernet) {
        (Direction::Ingress, true) => "tc_ingress_ether",
        (Direction::Egress, true) => "tc_egress_ether",
        (Direction::Ingress, false) => "tc_ingress_l3",
        (Direction::Egress, false) => "tc_egress_l3",
    }
}

pub(super) const XDP_PROGRAM: &str = "xdp_ingress";

/// The programs that this way of serving needs.
pub(super) fn wanted(socket_lb: SocketLb, xdp: Xdp) -> Vec<&'static str> {
    let cgroup = CGROUP_PROGRAMS.iter().map(|(name, _)| *name).filter(|_| socket_lb != SocketLb::Off);
    cgroup.chain(TC_PROGRAMS).chain((xdp != Xdp::Off).then_some(XDP_PROGRAM)).collect()
}

#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: &'static str,
    pub(super) fd: OwnedFd,
    pub(super) id: u32,
}

/// An error with all its causes: the verifier's words are in the last.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// What stands in `meta`: the programs as they were made (`digest`), and which ones these are, on which maps. Another program
/// under the same pin, or another map, has another id.
pub(super) fn fingerprint(digest: u64, programs: &[Program], maps: &[u32]) -> u64 {
    let ids = programs.iter().map(|program| program.id).chain(maps.iter().copied());
    ids.fold(Digest::new().bytes(&digest.to_le_bytes()), |digest, id| digest.bytes(&id.to_le_bytes())).finish()
}

pub(super) fn open(layout: &Layout, wanted: &[&'static str]) -> io::Result<Vec<Program>> {
    wanted
        .iter()
        .map(|name| {
            let fd = sys::open(&layout.programs.join(name))?;
            let id = sys::program_id(fd.as_fd())?;
            Ok(Program { name, fd, id })
        })
        .collect()
}

pub(super) fn map_ids(maps: &[(MapName, u32)], path: &dyn Fn(MapName) -> PathBuf) -> io::Result<Vec<u32>> {
    maps.iter().map(|(map, _)| sys::map_id(sys::open(&path(*map))?.as_fd())).collect()
}

pub(super) fn load(
    layout: &Layout,
    object: &[u8],
    globals: &Globals,
    wanted: &[&'static str],
    maps: &[(MapName, u32)],
    map_path: &dyn Fn(MapName) -> PathBuf,
) -> Result<Vec<Program>, DataplaneError> {
    let mut loader = EbpfLoader::new();
    globals.give(&mut loader);
    for (map, entries) in maps.iter().filter(|(map, _)| !map.is_unknown_to_programs()) {
        loader.map_max_entries(map.as_str(), *entries).map_pin_path(map.as_str(), map_path(*map));
    }
    let started = std::time::Instant::now();
    let mut ebpf = loader.load(object).map_err(|error| {
        unavailable(format!(
            "the eBPF object cannot be loaded: {}; the agent needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
            chain(&error)
        ))
    })?;
    let mut programs = vec![];
    for name in wanted {
        let program = ebpf
            .program_mut(name)
            .ok_or_else(|| unavailable(format!("the embedded eBPF object has no program {name}: build it again")))?;
        let loaded = match program {
            AyaProgram::CgroupSockAddr(program) => program.load(),
            AyaProgram::SchedClassifier(program) => program.load(),
            AyaProgram::Xdp(program) => program.load(),
            _ => return Err(unavailable(format!("the embedded program {name} is of an unexpected kind"))),
        };
        let remedy = if *name == XDP_PROGRAM { "; --xdp off does without" } else { "" };
        loaded.map_err(|error| unavailable(format!("program {name} cannot be loaded: {}{remedy}", chain(&error))))?;
        let fd = program
            .fd()
            .map_err(|error| unavailable(format!("program {name}: {}", chain(&error))))?
            .as_fd()
            .try_clone_to_owned()
            .map_err(kernel(format!("program {name}")))?;
        sys::pin_over(fd.as_fd(), &layout.programs.join(name)).map_err(kernel(format!("pin program {name}")))?;
        let id = sys::program_id(fd.as_fd()).map_err(kernel(format!("program {name}")))?;
        programs.push(Program { name, fd, id });
    }
    // Programs an earlier configuration pinned.
    for name in list(&layout.programs).map_err(kernel("pinned programs"))? {
        if !wanted.contains(&name.as_str()) {
            fs::remove_file(layout.programs.join(&name)).map_err(kernel(format!("unpin program {name}")))?;
        }
    }
    tracing::info!(programs = programs.len(), took = ?started.elapsed(), "loaded the programs");
    if globals.log_level > 0 {
        log::drain(&mut ebpf);
    }
    Ok(programs)
}
