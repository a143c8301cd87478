//! The object as this kernel takes it: before 6.2 without functions that are verified by themselves.
//!
//! Such a function is one that the object's types (BTF) call global. The kernel knows nothing of what its pointers lead to but how long it
//! is, and before 6.2 takes no such memory for the key of a map (`R2 type=mem expected=fp, pkt, pkt_meta, map_key, map_value`). Called
//! static they are walked with each of their callers, who know: that takes the verifier longer, and otherwise nothing is different.

use std::{borrow::Cow, fs, ops::Range};

const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const PTR: u32 = 2;
const STATIC: u32 = 0;
const GLOBAL: u32 = 1;

/// The object for the kernel that runs here. By its version, which errs on no side: static functions are good for any kernel.
pub fn suited(object: &[u8]) -> Cow<'_, [u8]> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) < (6_u32, 2_u32) => {
            made_static(object).map_or(Cow::Borrowed(object), Cow::Owned)
        }
        _ => Cow::Borrowed(object),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn offset(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?)).ok()
}

/// Where a section of an ELF file (64 bit, little-endian) is.
fn section(elf: &[u8], name: &str) -> Option<Range<usize>> {
    let (table, size) = (offset(elf, 40)?, usize::from(half(elf, 58)?));
    let (count, names) = (usize::from(half(elf, 60)?), usize::from(half(elf, 62)?));
    let header = |number: usize| elf.get(table.checked_add(number * size)?..);
    let strings = offset(header(names)?, 24)?;
    (0..count).find_map(|number| {
        let header = header(number)?;
        let called = elf.get(strings.checked_add(word(header, 0)? as usize)?..)?;
        let start = offset(header, 24)?;
        let found = called.strip_prefix(name.as_bytes())?.first() == Some(&0);
        if found { Some(start..start.checked_add(offset(header, 32)?)?) } else { None }
    })
}

/// One type of the object's: where its description is, its kind, how many of what its kind has several of, and the type it refers to.
struct Type {
    at: usize,
    kind: u32,
    several: u32,
    other: u32,
}

/// All types, by number from 1 on.
fn types(btf: &[u8]) -> Option<Vec<Type>> {
    let start = word(btf, 4)? as usize + word(btf, 8)? as usize;
    let end = start + word(btf, 12)? as usize;
    let (mut types, mut at) = (Vec::new(), start);
    while at < end {
        let (info, other) = (word(btf, at + 4)?, word(btf, at + 8)?);
        let (kind, several) = (info >> 24 & 0x1f, info & 0xffff);
        types.push(Type { at, kind, several, other });
        // What follows the three words, by kind (Documentation/bpf/btf.rst of the kernel).
        let more = match kind {
            1 | 14 | 17 => 4,
            3 => 12,
            4 | 5 | 15 | 19 => 12 * several,
            6 | 13 => 8 * several,
            _ => 0,
        };
        at += 12 + more as usize;
    }
    Some(types)
}

/// The same object with every global function that takes a pointer called static. `None`: it is not what it should be, or has none.
fn made_static(object: &[u8]) -> Option<Vec<u8>> {
    let place = section(object, ".BTF")?;
    let btf = object.get(place.clone())?;
    let types = types(btf)?;
    let numbered = |number: u32| types.get((number as usize).checked_sub(1)?);
    let takes_pointer = |function: &Type| {
        let proto = numbered(function.other).filter(|proto| proto.kind == FUNC_PROTO)?;
        // Each parameter: its name and its type.
        let parameters = (0..proto.several as usize).map(|n| word(btf, proto.at + 12 + n * 8 + 4));
        Some(parameters.flatten().any(|parameter| numbered(parameter).is_some_and(|kind| kind.kind == PTR)))
    };
    let mut changed = object.to_vec();
    let mut any = false;
    for function in types.iter().filter(|function| function.kind == FUNC && function.several == GLOBAL) {
        if takes_pointer(function) == Some(true) {
            let info = changed.get_mut(place.start + function.at + 4..)?.first_chunk_mut::<4>()?;
            *info = (FUNC << 24 | STATIC).to_le_bytes();
            any = true;
        }
    }
    any.then_some(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file whose only sections are names and types: a pointer, a function with it and one without.
    fn object(linkage: u32) -> Vec<u8> {
        let mut types: Vec<u32> = vec![0, PTR << 24, 0];
        types.extend([0, FUNC_PROTO << 24 | 1, 0, 0, 1]);
        types.extend([0, FUNC << 24 | linkage, 2]);
        types.extend([0, FUNC_PROTO << 24, 0]);
        types.extend([0, FUNC << 24 | linkage, 4]);
        let mut btf: Vec<u8> = vec![0x9f, 0xeb, 1, 0];
        let length = types.len() as u32 * 4;
        btf.extend([24, 0, length, length, 1].into_iter().chain(types).flat_map(u32::to_le_bytes));
        btf.push(0);
        let names = b"\0.BTF\0";
        let mut elf = vec![0; 64];
        elf[40..48].copy_from_slice(&64_u64.to_le_bytes());
        elf[58..64].copy_from_slice(&[64, 0, 2, 0, 0, 0]);
        for (name, at, size) in [(0_u32, 192, names.len()), (1, 192 + names.len(), btf.len())] {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend(header);
        }
        elf.extend(names);
        elf.extend(btf);
        elf
    }

    #[test]
    fn functions_that_take_pointers_become_static_and_others_stay() {
        let before = object(GLOBAL);
        let after = made_static(&before).unwrap();
        let differing: Vec<usize> = (0..before.len()).filter(|n| before[*n] != after[*n]).collect();
        assert_eq!(differing.len(), 1);
        let at = section(&after, ".BTF").unwrap();
        let linkages: Vec<u32> =
            types(&after[at]).unwrap().iter().filter(|t| t.kind == FUNC).map(|t| t.several).collect();
        assert_eq!(linkages, [STATIC, GLOBAL]);
        assert_eq!(made_static(&object(STATIC)), None);
    }

    #[test]
    fn what_is_cut_off_does_no_harm() {
        let whole = object(GLOBAL);
        for cut in 0..whole.len() {
            let _ = made_static(&whole[..cut]);
        }
    }
}
