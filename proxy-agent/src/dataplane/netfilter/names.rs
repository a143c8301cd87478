//! Names of what frontends share: the same content has the same name, after a restart, too, and on every node.

use std::hash::Hasher;

/// FNV-1a: nobody gains by a collision who could not write the Service anyway, and it is the same for ever, unlike the standard
/// library's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// Of texts, whose ends count: `["ab", "c"]` is not `["a", "bc"]`.
pub(crate) fn hash<'a>(parts: impl IntoIterator<Item = &'a str>) -> u64 {
    let mut fnv = Fnv::default();
    for part in parts {
        fnv.write(part.as_bytes());
        fnv.write(&[0]);
    }
    fnv.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_same_for_ever() {
        assert_eq!(hash(["default/web:http"]), 0xc6a1_e116_350a_d6b9);
        assert_ne!(hash(["ab", "c"]), hash(["a", "bc"]));
    }
}
