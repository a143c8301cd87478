//! The Internet checksum (RFC 1071), for packets that the programs build themselves and for updates in place (RFC 1624).
//!
//! Words are summed as they stand in memory (network order read natively): the one's-complement sum does not care about
//! byte order as long as it is stored back the same way.

/// Folds a 32- or 64-bit sum to 16 bits; not yet complemented.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

/// The checksum field for what was summed.
#[inline(always)]
pub const fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// A checksum field after a 16-bit word under it changed from `old` to `new` (RFC 1624, equation 3).
#[inline(always)]
pub const fn replace16(field: u16, old: u16, new: u16) -> u16 {
    !fold((!field) as u64 + (!old) as u64 + new as u64)
}

/// The same for a 32-bit word.
#[inline(always)]
pub const fn replace32(field: u16, old: u32, new: u32) -> u16 {
    !fold((!field) as u64 + (!old) as u64 + new as u64)
}

/// Sums `bytes` (an odd last byte is padded with zero).
pub fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|c| match c {
            [a, b] => u16::from_ne_bytes([*a, *b]) as u64,
            [a] => u16::from_ne_bytes([*a, 0]) as u64,
            _ => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    extern crate std;

    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;

    #[test]
    fn agrees_with_etherparse() {
        let header =
            etherparse::Ipv4Header::new(20, 64, etherparse::IpNumber::UDP, [10, 1, 0, 2], [10, 96, 0, 1]).unwrap();
        let mut bytes = header.to_bytes();
        bytes[10..12].fill(0);
        assert_eq!(finish(sum(&bytes)).to_ne_bytes(), header.calc_header_checksum().to_be_bytes());
    }

    proptest! {
        #[test]
        fn replacing_equals_summing_anew(mut bytes in prop::collection::vec(any::<u8>(), 20..60), at in 0usize..8, new: u32) {
            if bytes.len() % 2 == 1 { bytes.pop(); }
            let at = at * 2;
            let field = finish(sum(&bytes));
            let old32 = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
            let mut changed: Vec<u8> = bytes.clone();
            changed[at..at + 4].copy_from_slice(&new.to_ne_bytes());
            // 0x0000 and 0xffff are the same number in one's complement.
            let canonical = |f: u16| if f == 0xffff { 0 } else { f };
            prop_assert_eq!(canonical(replace32(field, old32, new)), canonical(finish(sum(&changed))));

            let new16 = new as u16;
            let old16 = u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap());
            let mut changed = bytes.clone();
            changed[at..at + 2].copy_from_slice(&new16.to_ne_bytes());
            prop_assert_eq!(canonical(replace16(field, old16, new16)), canonical(finish(sum(&changed))));
        }
    }
}
