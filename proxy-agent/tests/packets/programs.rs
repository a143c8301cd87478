//! What the verifier makes of the programs: on each kernel that was tried, no more than it did before.

use std::{collections::BTreeMap, env, fs};

use aya::{
    EbpfLoader,
    programs::{Program, ProgramError},
};

/// Instructions that the verifier walked, by program and kernel; a tenth more fails.
const WALKED: &str = include_str!("../verifier.txt");

/// A kernel's column: by program.
fn column(series: &str) -> Option<BTreeMap<&'static str, u32>> {
    let mut lines = WALKED.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let number = lines.next()?.split_whitespace().position(|name| name == series)?;
    lines
        .map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?;
            Some((name, words.nth(number - 1)?.parse().ok()?))
        })
        .collect()
}

/// `6.1` of `6.1.0-56-cloud-amd64`.
fn series() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    release.trim().splitn(3, ['.', '-']).take(2).collect::<Vec<_>>().join(".")
}

#[test]
fn programs_load_and_stay_small() {
    if let Some(reason) = super::support::skip() {
        return println!("SKIP programs_load_and_stay_small: {reason}");
    }
    let series = series();
    let known = column(&series);
    let object = fs::read(env::var_os("PROXY_EBPF_OBJECT").unwrap()).unwrap();
    let mut ebpf = EbpfLoader::new().load(&proxy_agent::dataplane::ebpf::linkage::suited(&object)).unwrap();
    let (mut seen, mut wrong) = (BTreeMap::new(), Vec::new());
    for (name, program) in ebpf.programs_mut() {
        let loaded = match program {
            Program::SchedClassifier(program) => program.load(),
            Program::Xdp(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            _ => panic!("{name} is of another kind"),
        };
        match loaded {
            Ok(()) => {}
            Err(ProgramError::LoadError { verifier_log, .. }) => {
                let log = verifier_log.to_string();
                wrong.push(format!("{name}: {}", &log[log.len().saturating_sub(3000)..]));
                continue;
            }
            Err(e) => panic!("{name}: {e}"),
        }
        let info = program.info().unwrap();
        let walked = info.verified_instruction_count().unwrap_or_default();
        println!("{series} {name}: verified {walked} instructions, {} bytes of machine code", info.size_jitted());
        match known.as_ref().map(|known| known.get(name)) {
            None => {}
            Some(Some(before)) if walked <= before + before / 10 => {}
            Some(Some(before)) => wrong.push(format!("{name}: {walked} instructions, {before} before")),
            Some(None) => {
                wrong.push(format!("{name}: {walked} instructions, and no line in proxy-agent/tests/verifier.txt"))
            }
        }
        seen.insert(name.to_owned(), walked);
    }
    for name in known.iter().flat_map(BTreeMap::keys).filter(|name| !seen.contains_key(**name)) {
        wrong.push(format!("{name}: not loaded"));
    }
    assert!(wrong.is_empty(), "kernel {series}:\n{}", wrong.join("\n"));
    if known.is_none() {
        println!("SKIP programs_load_and_stay_small: kernel {series} has no column in proxy-agent/tests/verifier.txt");
    }
}
