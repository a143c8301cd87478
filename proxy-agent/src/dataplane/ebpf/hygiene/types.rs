//! What the kernel's own types (BTF) say, as far as the iterator over the notes in sockets must know them.

use std::{fs, io};

/// The kernel's function whose type says what such a program gets.
const HOOK: &str = "bpf_iter_bpf_sk_storage_map";

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;
const FUNC: u32 = 12;
/// Set where a member's offset shares its word with the width of a bit field.
const HAS_BIT_FIELDS: u32 = 1 << 31;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Kernel {
    /// Id of the function's type.
    pub(super) hook: u32,
    /// Where `struct sock` has its state: `struct sock_common`, which it begins with, has it.
    pub(super) state: i16,
}

impl Kernel {
    pub(super) fn read() -> io::Result<Self> {
        let path = "/sys/kernel/btf/vmlinux";
        let missing = || io::Error::other(format!("{path} does not say how to read the notes in sockets"));
        find(&fs::read(path)?).ok_or_else(missing)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The types stand one after the other, each as long as its kind says (Documentation/bpf/btf.rst).
fn find(btf: &[u8]) -> Option<Kernel> {
    // Magic, version, flags; its own length; then offset and length of types and of strings, counted from its end.
    if u16::from_ne_bytes(*btf.first_chunk()?) != MAGIC {
        return None;
    }
    let body = btf.get(word(btf, 4)? as usize..)?;
    let part = |at| body.get(word(btf, at)? as usize..)?.get(..word(btf, at + 4)? as usize);
    let (mut types, strings) = (part(8)?, part(16)?);
    let is = |name: u32, wanted: &str| {
        let rest = strings.get(name as usize..).and_then(|rest| rest.strip_prefix(wanted.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    };
    let (mut hook, mut state) = (None, None);
    for id in 1.. {
        let (Some(name), Some(info)) = (word(types, 0), word(types, 4)) else { break };
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        let rest = types.get(12..)?;
        let length = match kind {
            // Integers, variables, declaration tags; arrays.
            1 | 14 | 17 => 4,
            3 => 12,
            // What has members, sections, 64-bit enumerations; enumerations, parameters.
            4 | 5 | 15 | 19 => 12 * count,
            6 | 13 => 8 * count,
            0 | 20.. => return None,
            // Refers to another type, and that is all.
            _ => 0,
        };
        let more = rest.get(..length)?;
        if kind == FUNC && is(name, HOOK) {
            hook = Some(id);
        } else if kind == STRUCT && state.is_none() && is(name, "sock_common") {
            let member =
                more.chunks_exact(12).find(|member| word(member, 0).is_some_and(|name| is(name, "skc_state")))?;
            let bits = word(member, 8)?;
            let bits = if info & HAS_BIT_FIELDS == 0 { bits } else { bits & 0x00ff_ffff };
            state = Some(i16::try_from(bits / 8).ok()?);
        }
        types = rest.get(length..)?;
    }
    Some(Kernel { hook: hook?, state: state? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn btf(types: &[&[u32]], strings: &str) -> Vec<u8> {
        let types: Vec<u8> = types.concat().into_iter().flat_map(u32::to_ne_bytes).collect();
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            bytes.extend(u32::to_ne_bytes(word));
        }
        bytes.extend(types);
        bytes.extend(strings.as_bytes());
        bytes
    }

    #[test]
    fn finds_function_and_member_among_others() {
        let strings = "\0sock_common\0skc_state\0skc_family\0bpf_iter_bpf_sk_storage_map\0sock_common2\0";
        let at = |name: &str| strings.find(&format!("\0{name}\0")).unwrap() as u32 + 1;
        let members = |flag: u32| {
            let head = [at("sock_common"), STRUCT << 24 | 2 | flag, 20];
            [&head[..], &[at("skc_family"), 1, 128], &[at("skc_state"), 1, 144]].concat()
        };
        let enumeration = [0, 6 << 24 | 1, 4, at("skc_state"), 1];
        let hook = [at(HOOK), FUNC << 24, 1];
        let decoy = [at("sock_common2"), STRUCT << 24, 0];
        let int = [0, 1 << 24, 1, 8];
        for flag in [0, HAS_BIT_FIELDS] {
            let found = find(&btf(&[&int, &enumeration, &decoy, &members(flag), &hook], strings));
            assert_eq!(found, Some(Kernel { hook: 5, state: 18 }));
        }
        assert_eq!(find(&btf(&[&int, &hook], strings)), None, "no such structure");
        assert_eq!(find(&btf(&[&members(0), &[0, 20 << 24, 0], &hook], strings)), None, "a kind that is not known");
        assert_eq!(find(&btf(&[&members(0), &hook[..2]], strings)), None, "cut off");
        assert_eq!(find(b""), None);
    }

    #[test]
    fn the_running_kernel_says_it() {
        match Kernel::read() {
            // As in every kernel since 2012 (ce43b03e8889); a later one may differ, and this be changed.
            Ok(kernel) => assert_eq!(kernel.state, 18),
            Err(error) if error.kind() == io::ErrorKind::NotFound => println!("SKIP types of the kernel: {error}"),
            Err(error) => panic!("{error}"),
        }
    }
}
