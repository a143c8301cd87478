//! Seals: how a reader in the kernel knows that what it copied out of a map is one value, of the key it asked for.
//!
//! A map value is overwritten under its readers (a 32-byte array value was read torn tens of thousands of times in
//! 200 M reads on 6.18), and a hash element is recycled for another key while a reader still holds it, in every hash
//! flavour. So a value whose fields must agree carries a 32-bit digest of its fields *and of its key*. The writer
//! computes it, the reader copies the value word by word and computes it again; on a mismatch it looks the key up once
//! more and counts the event ([`Reason::TornRead`](crate::counters::Reason::TornRead)).
//!
//! This holds whatever order the kernel's `memcpy` writes in, on every architecture. A false match needs a collision
//! of 2⁻³² on top of the race.

/// Running digest. Not cryptographic: it tells accidents apart, not adversaries (only the agent and the programs write).
#[derive(Clone, Copy)]
pub struct Seal(u64);

impl Seal {
    #[inline(always)]
    pub const fn new() -> Self {
        Self(0x243f_6a88_85a3_08d3)
    }

    #[inline(always)]
    #[must_use]
    pub const fn word(self, word: u64) -> Self {
        let mixed = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self(mixed ^ (mixed >> 32))
    }

    /// Never zero, so a value that is all zeroes is never taken for a sealed one.
    #[inline(always)]
    pub const fn finish(self) -> u32 {
        let folded = (self.0.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32) as u32;
        if folded == 0 { 1 } else { folded }
    }
}

impl Default for Seal {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_content_matter() {
        let seal = |words: &[u64]| words.iter().fold(Seal::new(), |s, w| s.word(*w)).finish();
        assert_ne!(seal(&[1, 2]), seal(&[2, 1]));
        assert_ne!(seal(&[0]), seal(&[0, 0]));
        assert_ne!(seal(&[1 << 63]), seal(&[0]));
        assert_ne!(seal(&[0, 0, 0]), 0);
    }
}
