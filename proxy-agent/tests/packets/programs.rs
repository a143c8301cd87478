//! What the verifier makes of the programs.

use std::{env, fs};

use aya::{
    EbpfLoader,
    programs::{Program, ProgramError},
};

/// Instructions the verifier walked at the time of writing, by program; a tenth more fails.
const WALKED: [(&str, u32); 5] = [
    ("tc_ingress_ether", 222_300),
    ("tc_ingress_l3", 222_300),
    ("tc_egress_ether", 103_800),
    ("tc_egress_l3", 103_800),
    ("xdp_ingress", 358_000),
];

#[test]
fn programs_load_and_stay_small() {
    if let Some(reason) = super::support::skip() {
        return println!("SKIP programs_load_and_stay_small: {reason}");
    }
    let object = fs::read(env::var_os("PROXY_EBPF_OBJECT").unwrap()).unwrap();
    let mut ebpf = EbpfLoader::new().load(&object).unwrap();
    for (name, limit) in WALKED {
        let program = ebpf.program_mut(name).unwrap();
        let loaded = match program {
            Program::SchedClassifier(program) => program.load(),
            Program::Xdp(program) => program.load(),
            _ => panic!("{name} is of another kind"),
        };
        match loaded {
            Ok(()) => {}
            Err(ProgramError::LoadError { verifier_log, .. }) => {
                let log = verifier_log.to_string();
                panic!("{name}: {}", &log[log.len().saturating_sub(8000)..]);
            }
            Err(e) => panic!("{name}: {e}"),
        }
        let info = program.info().unwrap();
        let walked = info.verified_instruction_count().unwrap_or_default();
        println!("{name}: verified {walked} instructions, {} bytes of machine code", info.size_jitted());
        assert!(walked <= limit + limit / 10, "{name}: {walked} instructions, {limit} before");
    }
}
