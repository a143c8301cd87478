//! The compiled programs inside this binary, and the digest that says whether the kernel already runs them.

use crate::dataplane::DataplaneError;

/// 4-byte aligned, as the ELF parser wants it. Empty when the agent was built without programs.
static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs.o"));

/// Whether this binary holds the programs.
pub fn is_embedded() -> bool {
    !PROGRAMS.is_empty()
}

/// The ELF object.
pub fn bytes() -> Result<&'static [u8], DataplaneError> {
    if is_embedded() {
        Ok(PROGRAMS)
    } else {
        Err(DataplaneError::Unavailable(
            "this binary was built without eBPF programs: build with `cargo xtask build`".into(),
        ))
    }
}

/// Running 64-bit FNV-1a: stable over releases of the compiler, unlike the standard hasher, since it is compared with what an
/// earlier build wrote into `meta`.
#[derive(Clone, Copy)]
pub(crate) struct Digest(u64);

impl Digest {
    pub(crate) const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    #[must_use]
    pub(crate) fn bytes(self, bytes: &[u8]) -> Self {
        let hash = |state: u64, bytes: &[u8]| {
            bytes.iter().fold(state, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3))
        };
        // The length keeps ("ab", "c") apart from ("a", "bc").
        Self(hash(hash(self.0, &(bytes.len() as u64).to_le_bytes()), bytes))
    }

    /// Never 0, which `meta` holds before anything was loaded.
    pub(crate) const fn finish(self) -> u64 {
        if self.0 == 0 { 1 } else { self.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_tells_pieces_apart() {
        let of = |parts: &[&str]| parts.iter().fold(Digest::new(), |d, p| d.bytes(p.as_bytes())).finish();
        assert_eq!(of(&["ab", "c"]), of(&["ab", "c"]));
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
        assert_ne!(of(&["ab"]), of(&["ab", ""]));
    }

    #[test]
    fn an_empty_stub_is_said_aloud() {
        match bytes() {
            Ok(elf) => assert_eq!(elf.get(..4), Some(&b"\x7fELF"[..])),
            Err(error) => assert!(error.to_string().contains("cargo xtask build"), "{error}"),
        }
    }
}
