//! The programs: which there are, loaded or taken up from their pins.

use std::{
    collections::BTreeMap,
    fs, io,
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program as AyaProgram, ProgramError},
};

use super::{
    globals::Globals,
    links::list,
    refusal::{in_a_line, refused, remedy},
};
use crate::dataplane::{
    DataplaneError,
    ebpf::{
        SocketLb, Xdp, clsact::Direction, kernel, layout::MapName, linkage, log, object::Digest, pins::Layout, sys,
        unavailable,
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

/// Per-packet programs, and what brings fragments back to them.
const TC_PROGRAMS: [&str; 5] = ["tc_ingress_ether", "tc_egress_ether", "tc_ingress_l3", "tc_egress_l3", RETURN_PROGRAM];
/// Attached nowhere: the agent runs it.
pub(crate) const RETURN_PROGRAM: &str = "tc_return";

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

/// Programs, and why there is none for XDP, if it is asked for.
pub(super) struct Loaded {
    pub(super) programs: Vec<Program>,
    pub(super) without_xdp: Option<String>,
}

/// Loads what is wanted. XDP is a short cut: where the kernel refuses its program, everything is served without, unless it is `native`
/// that was asked for.
pub(super) fn load(
    object: &[u8],
    globals: &Globals,
    (wanted, xdp): (&[&'static str], Xdp),
    maps: &[(MapName, u32)],
    map_path: &dyn Fn(MapName) -> PathBuf,
) -> Result<Loaded, DataplaneError> {
    let mut loader = EbpfLoader::new();
    globals.give(&mut loader);
    for (map, entries) in maps.iter().filter(|(map, _)| !map.is_unknown_to_programs()) {
        loader.map_max_entries(map.as_str(), *entries).map_pin_path(map.as_str(), map_path(*map));
    }
    let started = std::time::Instant::now();
    let mut ebpf = loader.load(&linkage::suited(object)).map_err(|error| {
        unavailable(format!(
            "the eBPF object cannot be loaded: {}; the agent needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
            in_a_line(&error)
        ))
    })?;
    let mut loaded = load_side_by_side(&mut ebpf, wanted);
    let mut programs: Vec<Program> = vec![];
    let mut without_xdp = None;
    for name in wanted {
        let loaded = loaded
            .remove(*name)
            .ok_or_else(|| unavailable(format!("the embedded eBPF object has no program {name}: build it again")))??;
        let fd = match loaded {
            Ok(fd) => fd,
            Err(error) if *name == XDP_PROGRAM && xdp != Xdp::Native => {
                let why = format!("{}; use a later kernel, or --xdp off", refused(name, &error));
                tracing::warn!("served without XDP: {why}");
                without_xdp = Some(why);
                continue;
            }
            Err(error) => {
                let remedy = remedy(&error);
                let remedy = if *name == XDP_PROGRAM { "--xdp auto does without where it has to" } else { remedy };
                return Err(unavailable(format!("{}; {remedy}", refused(name, &error))));
            }
        };
        let id = sys::program_id(fd.as_fd()).map_err(kernel(format!("program {name}")))?;
        programs.push(Program { name, fd, id });
    }
    tracing::info!(programs = programs.len(), took = ?started.elapsed(), "loaded the programs");
    if globals.log_level > 0 {
        log::drain(&mut ebpf);
    }
    Ok(Loaded { programs, without_xdp })
}

/// Pins these, and no others.
pub(super) fn pin(layout: &Layout, programs: &[Program]) -> Result<(), DataplaneError> {
    for Program { name, fd, id: _ } in programs {
        sys::pin_over(fd.as_fd(), &layout.programs.join(name)).map_err(kernel(format!("pin program {name}")))?;
    }
    // Programs an earlier configuration pinned, or one that is refused now.
    for name in list(&layout.programs).map_err(kernel("pinned programs"))? {
        if !programs.iter().any(|program| program.name == name) {
            fs::remove_file(layout.programs.join(&name)).map_err(kernel(format!("unpin program {name}")))?;
        }
    }
    Ok(())
}

/// What came of loading one: the kernel may have refused it, or it could not be asked.
type Outcome = Result<Result<OwnedFd, ProgramError>, DataplaneError>;

/// Loads them on as many threads as there are CPUs: nearly all that it takes is the kernel's verifier, which looks at each program by itself.
fn load_side_by_side(ebpf: &mut Ebpf, wanted: &[&'static str]) -> BTreeMap<String, Outcome> {
    let waiting = ebpf.programs_mut().filter(|(name, _)| wanted.contains(name));
    let waiting = Mutex::new(waiting.map(|(name, program)| (name.to_owned(), program)).collect::<Vec<_>>());
    let loaded = Mutex::new(BTreeMap::new());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let work = || {
        while let Some((name, program)) = next() {
            let outcome = load_one(&name, program);
            loaded.lock().unwrap_or_else(PoisonError::into_inner).insert(name, outcome);
        }
    };
    thread::scope(|scope| {
        for _ in 1..thread::available_parallelism().map_or(1, NonZeroUsize::get).min(wanted.len()) {
            // Without more threads it takes longer, that is all.
            let _ = thread::Builder::new().name("loading".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
    loaded.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn load_one(name: &str, program: &mut AyaProgram) -> Outcome {
    let loaded = match program {
        AyaProgram::CgroupSockAddr(program) => program.load(),
        AyaProgram::SchedClassifier(program) => program.load(),
        AyaProgram::Xdp(program) => program.load(),
        _ => return Err(unavailable(format!("the embedded program {name} is of an unexpected kind"))),
    };
    if let Err(error) = loaded {
        return Ok(Err(error));
    }
    let fd = program.fd().map_err(|error| unavailable(format!("program {name}: {}", in_a_line(&error))))?;
    fd.as_fd().try_clone_to_owned().map(Ok).map_err(kernel(format!("program {name}")))
}
