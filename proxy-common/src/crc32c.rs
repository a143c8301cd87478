//! The checksum of SCTP (CRC32c; RFC 9260, appendix A) after bytes of a packet changed, without reading the rest of it.
//!
//! A CRC is linear: that of the changed packet is that of the old one, XOR that of the difference alone, which is zero but for a few
//! bytes. Zero bytes behind a difference multiply it by a power of x, so it is moved on by 1, 2, 4 … bytes with a table for each:
//! at most 16 steps for the longest packet there is.

/// The polynomial, lowest bit first.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Powers of two of bytes: lengths up to 64 KiB.
const STEPS: usize = 16;

/// What each half-byte of a register becomes: tables of that kind are small, and need eight looks.
type Step = [[u32; 16]; 8];

/// In memory once: 8 KiB.
static OVER: [Step; STEPS] = steps();

/// Moves a register over one zero byte, bit by bit.
const fn over_one(mut register: u32) -> u32 {
    let mut bit = 0;
    while bit < 8 {
        register = (register >> 1) ^ (POLYNOMIAL & (register & 1).wrapping_neg());
        bit += 1;
    }
    register
}

#[expect(clippy::indexing_slicing, reason = "all indices are constants or masked; out of bounds would not compile")]
#[inline(always)]
const fn apply(step: &Step, register: u32) -> u32 {
    let mut moved = 0;
    let mut digit = 0;
    while digit < 8 {
        moved ^= step[digit][(register >> (digit * 4)) as usize & 15];
        digit += 1;
    }
    moved
}

#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler, for which out of bounds is an error")]
const fn steps() -> [Step; STEPS] {
    let mut steps = [[[0; 16]; 8]; STEPS];
    let mut step = 0;
    while step < STEPS {
        let mut digit = 0;
        while digit < 8 {
            let mut value = 0;
            while value < 16 {
                let register = (value as u32) << (digit * 4);
                steps[step][digit][value] = if step == 0 {
                    over_one(register)
                } else {
                    // Twice as far as the step before.
                    apply(&steps[step - 1], apply(&steps[step - 1], register))
                };
                value += 1;
            }
            digit += 1;
        }
        step += 1;
    }
    steps
}

/// What the checksum of a packet changes by (XOR) if its first four bytes change by `difference`, and it has `len` bytes. Both are
/// words as they stand in the packet, lowest byte first, which is how SCTP writes its checksum down.
#[expect(clippy::indexing_slicing, reason = "the index is below the number of steps")]
#[inline(always)]
#[must_use]
pub fn change(difference: u32, len: u32) -> u32 {
    let (mut register, mut len, mut step) = (difference, len, 0);
    while step < STEPS {
        if len & 1 != 0 {
            register = apply(&OVER[step], register);
        }
        len >>= 1;
        step += 1;
    }
    register
}

#[cfg(test)]
mod tests {
    extern crate std;

    use proptest::prelude::*;

    use super::*;

    /// As RFC 9260 defines it, bit by bit.
    fn crc32c(bytes: &[u8]) -> u32 {
        let register = bytes.iter().fold(u32::MAX, |mut register, byte| {
            register ^= u32::from(*byte);
            for _ in 0..8 {
                register = if register & 1 == 1 { register >> 1 ^ POLYNOMIAL } else { register >> 1 };
            }
            register
        });
        !register
    }

    #[test]
    fn the_plain_one_is_crc32c() {
        // The check value of the algorithm's catalogue, and two of RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    fn check(mut packet: std::vec::Vec<u8>, ports: [u8; 4]) {
        let before = crc32c(&packet);
        let old = u32::from_le_bytes(packet[..4].try_into().unwrap());
        packet[..4].copy_from_slice(&ports);
        let difference = old ^ u32::from_le_bytes(ports);
        assert_eq!(before ^ change(difference, packet.len() as u32), crc32c(&packet), "{} bytes", packet.len());
    }

    #[test]
    fn every_length_up_to_a_page_and_the_longest() {
        for len in (4..4200).chain([8191, 8192, 9000, 32_767, 32_768, 65_515, 65_535]) {
            let packet = (0..len).map(|n: u32| (n * 37 + len) as u8).collect();
            check(packet, [0x1f, 0x90, 0, 80]);
        }
    }

    proptest! {
        #[test]
        fn changing_equals_summing_anew(packet in prop::collection::vec(any::<u8>(), 12..3000), ports: [u8; 4]) {
            check(packet, ports);
        }

        #[test]
        fn no_change_of_ports_goes_unnoticed(difference: u32, len in 4_u32..65_536) {
            prop_assert_eq!(change(difference, len) == 0, difference == 0);
        }
    }
}
