//! Maglev: which backend a flow gets is told by a hash of the flow and a table made of the backends alone, so every node
//! that knows the same backends sends a flow to the same one, and a backend that leaves moves hardly any flow but its own.
//!
//! ```text
//! range:  base ─► count slots, sorted ─► size slots: the table, position → backend
//! ```
//!
//! INVARIANT: nothing here depends on the node, its byte order, the time or the order in which backends became known. What a change
//! of this file moves, it moves between nodes of different versions as well.
//!
//! The table is that of Eisenbud et al., *Maglev: A Fast and Reliable Software Network Load Balancer* (NSDI 2016, 3.4).

use crate::{
    Address, Be16,
    slot::{Target, sort_key},
};

/// Sizes of a table, by index less one; primes, so that every walk comes past every position.
///
/// Few and far apart: where a set outgrows its table, nearly every flow moves. So a table is outgrown where Deployments are not wont to
/// be while they roll: beyond 7 and 38 backends, 5 and a quarter, and 30 and a quarter.
pub const SIZES: [u16; 3] = [4513, 16_381, 65_521];

/// The most backends that a table serves, by index less one. With these, one of them that leaves moves about one in a hundred of the others'
/// flows, of seven sometimes four (A table of a hundred positions a backend moves twice as many).
const MOST: [usize; SIZES.len()] = [7, 38, SIZES[SIZES.len() - 1] as usize];

/// The same in one word: an array indexed by a variable is a map look-up to a program.
const PACKED: u64 = SIZES[0] as u64 | (SIZES[1] as u64) << 16 | (SIZES[2] as u64) << 32;

/// The table that this many backends get; 0: none. One backend needs none, and more than the largest table has positions
/// would not all be in it.
pub const fn index_for(backends: usize) -> u8 {
    if backends < 2 {
        return 0;
    }
    let mut index = 0;
    while index < MOST.len() {
        if backends <= MOST[index] {
            return index as u8 + 1;
        }
        index += 1;
    }
    0
}

/// Positions of table `index`; 0 where there is none.
#[inline(always)]
pub const fn size(index: u8) -> u32 {
    if index == 0 || index as usize > SIZES.len() { 0 } else { (PACKED >> ((index as u32 - 1) * 16)) as u32 & 0xffff }
}

/// The position below `size` that `hash` leads to.
#[inline(always)]
pub const fn position(hash: u32, size: u32) -> u32 {
    ((hash as u64 * size as u64) >> 32) as u32
}

/// Running hash of numbers in host order.
#[derive(Clone, Copy)]
struct Hash(u64);

impl Hash {
    const NEW: Self = Self(0x6a09_e667_f3bc_c908);

    #[inline(always)]
    const fn word(self, word: u64) -> Self {
        let mixed = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self(mixed ^ (mixed >> 32))
    }

    #[inline(always)]
    const fn finish(self) -> u64 {
        let mixed = (self.0 ^ (self.0 >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    #[inline(always)]
    fn target<A: Address>(self, target: Target<A>) -> Self {
        let (hi, lo, port) = sort_key(target);
        if A::LEN == 4 { self.word(hi << 16 | port as u64) } else { self.word(hi).word(lo).word(port as u64) }
    }
}

/// The hash of a flow: its two ends and its protocol.
#[inline(always)]
pub fn flow<A: Address>(src: Target<A>, dst: Target<A>, proto: u8) -> u32 {
    (Hash::NEW.target(src).target(dst).word(proto as u64).finish() >> 32) as u32
}

/// The hash of a client that keeps its backend whatever it opens (session affinity).
#[inline(always)]
pub fn client<A: Address>(addr: A) -> u32 {
    (Hash::NEW.target(Target { addr, port: Be16::ZERO }).finish() >> 32) as u32
}

/// The hash of a client that is known by its network namespace alone: at connect time there is no address yet.
#[inline(always)]
pub fn namespace(cookie: u64) -> u32 {
    (Hash::NEW.word(cookie).finish() >> 32) as u32
}

/// The order in which a backend asks for the positions of a table.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    next: u32,
    step: u32,
}

impl Walk {
    /// Of `backend`, through a table of `size` positions, more than 1.
    pub fn new<A: Address>(backend: Target<A>, size: u32) -> Self {
        let hash = Hash::NEW.target(backend).finish();
        Self { next: position((hash >> 32) as u32, size), step: 1 + position(hash as u32, size - 1) }
    }
}

/// Fills a table, whose length is one of [`SIZES`], with indices into `walks`: the backends take turns, each the next position
/// on its walk that is still free. So their shares differ by one position at most.
pub fn populate(walks: &mut [Walk], table: &mut [u16]) {
    const FREE: u16 = u16::MAX;
    table.fill(FREE);
    let size = table.len() as u32;
    let mut free = table.len();
    while free > 0 && !walks.is_empty() {
        for (backend, walk) in walks.iter_mut().enumerate().take(free) {
            for _ in 0..size {
                let at = walk.next;
                walk.next = (at + walk.step) % size;
                if let Some(position) = table.get_mut(at as usize).filter(|position| **position == FREE) {
                    *position = backend as u16;
                    break;
                }
            }
            free -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{collections::BTreeMap, vec, vec::Vec};

    use super::*;
    use crate::{Ipv4Be, Ipv6Be, proto};

    fn backend(n: u32) -> Target<Ipv4Be> {
        let [_, b, c, d] = (n + 1).to_be_bytes();
        Target { addr: Ipv4Be::from_octets([10, b, c, d]), port: Be16::from_host(8080) }
    }

    /// Position → backend.
    fn table(backends: &[Target<Ipv4Be>], index: u8) -> Vec<Target<Ipv4Be>> {
        let size = size(index);
        let mut walks: Vec<_> = backends.iter().map(|b| Walk::new(*b, size)).collect();
        let mut table = vec![0; size as usize];
        populate(&mut walks, &mut table);
        table.into_iter().map(|n| backends[usize::from(n)]).collect()
    }

    fn shares(table: &[Target<Ipv4Be>]) -> BTreeMap<u32, usize> {
        let mut shares = BTreeMap::new();
        for backend in table {
            *shares.entry(backend.addr.0).or_default() += 1;
        }
        shares
    }

    /// Of the positions that the backends of both tables hold in one of them: how many are another's in the other.
    fn moved(more: &[Target<Ipv4Be>], fewer: &[Target<Ipv4Be>], gone: Target<Ipv4Be>) -> f64 {
        let stayed = more.iter().zip(fewer).filter(|(a, _)| **a != gone);
        let (mut all, mut moved) = (0, 0);
        for (a, b) in stayed {
            all += 1;
            moved += usize::from(a != b);
        }
        moved as f64 / all as f64
    }

    #[test]
    fn sizes_are_primes_that_grow() {
        for size in SIZES.map(u32::from) {
            assert!((2..size).take_while(|d| d * d <= size).all(|d| size % d != 0), "{size}");
        }
        assert!(SIZES.is_sorted());
        assert_eq!([0, 1, 2, 3, 4, 15, 255].map(size), [0, 4513, 16_381, 65_521, 0, 0, 0]);
        let wanted = [(0, 0), (1, 0), (2, 1), (7, 1), (8, 2), (38, 2), (39, 3), (65_521, 3), (65_522, 0)];
        for (backends, index) in wanted {
            assert_eq!(index_for(backends), index, "{backends}");
        }
    }

    #[test]
    fn positions_are_below_the_size() {
        for size in [1, 3, 4513, 65_521] {
            assert_eq!((position(0, size), position(u32::MAX, size)), (0, size - 1));
        }
    }

    /// Agents of different versions, and programs of either byte order, must agree: these numbers never change.
    #[test]
    fn hashes_and_tables_are_fixed() {
        let v4 = |text: &str, port| Target {
            addr: Ipv4Be::from_ip(text.parse().unwrap()).unwrap(),
            port: Be16::from_host(port),
        };
        let v6 = |text: &str, port| Target {
            addr: Ipv6Be::from_ip(text.parse().unwrap()).unwrap(),
            port: Be16::from_host(port),
        };
        let hashes = [
            flow(v4("192.0.2.7", 40_000), v4("10.96.0.10", 80), proto::TCP),
            flow(v4("192.0.2.7", 40_000), v4("10.96.0.10", 80), proto::UDP),
            flow(v6("2001:db8::7", 40_000), v6("fd00:96::10", 80), proto::TCP),
            client(v4("192.0.2.7", 0).addr),
            client(v6("2001:db8::7", 0).addr),
            namespace(4711),
        ];
        assert_eq!(hashes, [1_295_719_113, 403_290_539, 2_561_836_160, 1_123_959_718, 1_232_240_935, 498_501_365]);
        let backends: Vec<_> = (0..3).map(backend).collect();
        let first: Vec<_> = table(&backends, 1)[..16].iter().map(|b| b.addr.octets()[3]).collect();
        assert_eq!(first, [2, 3, 3, 1, 2, 2, 3, 1, 1, 3, 2, 2, 1, 3, 3, 1]);
    }

    #[test]
    fn every_end_of_a_flow_counts() {
        let (a, b) = (backend(1), backend(2));
        let one = flow(a, b, proto::TCP);
        assert_ne!(one, flow(b, a, proto::TCP), "the other way");
        assert_ne!(one, flow(a, b, proto::UDP));
        assert_ne!(one, flow(Target { port: Be16::from_host(1), ..a }, b, proto::TCP));
        assert_ne!(one, flow(a, Target { port: Be16::from_host(1), ..b }, proto::TCP));
        assert_ne!(client(a.addr), client(b.addr));
    }

    /// Chi-square over ten backends: nine degrees of freedom exceed 39 in one case out of 10⁵. The ports of one client in turn, as kernels
    /// hand them out; neighbouring clients; namespaces in the order they were made.
    #[test]
    fn flows_are_spread_evenly() {
        let chi = |hashes: &mut dyn Iterator<Item = u32>| {
            let (mut hits, mut all) = ([0.0_f64; 10], 0.0);
            for hash in hashes {
                hits[position(hash, 10) as usize] += 1.0;
                all += 1.0;
            }
            hits.iter().map(|n| (n - all / 10.0).powi(2) / (all / 10.0)).sum::<f64>()
        };
        let port = |n: u32| Be16::from_host(1024 + n as u16);
        let spread = [
            chi(&mut (0..40_000).map(|n| flow(Target { port: port(n), ..backend(7) }, backend(1), proto::TCP))),
            chi(&mut (0..20_000).map(|n| flow(Target { port: port(2 * n), ..backend(7) }, backend(1), proto::TCP))),
            chi(&mut (0..40_000).map(|n| flow(backend(n), backend(1), proto::TCP))),
            chi(&mut (0..40_000).map(|n| client(backend(n).addr))),
            chi(&mut (0..40_000).map(namespace)),
        ];
        assert!(spread.iter().all(|chi| *chi < 39.0), "{spread:?}");
    }

    #[test]
    fn shares_differ_by_one_position() {
        for n in [1, 2, 3, 7, 10, 11, 100, 1000, 10_000] {
            let backends: Vec<_> = (0..n).map(backend).collect();
            let index = index_for(backends.len()).max(1);
            let shares = shares(&table(&backends, index));
            let (min, max) = (shares.values().min().unwrap(), shares.values().max().unwrap());
            assert_eq!(shares.len(), backends.len());
            assert!(
                max - min <= 1 && (n > 1000 || (*max as f64) / (*min as f64) <= 1.05),
                "{n} backends: {min} to {max} of {} positions",
                size(index)
            );
        }
    }

    /// What a backend that leaves moves beside its own flows, and one that joins beside those it gets, as long as the table stays:
    /// hardly more than one in a hundred at the worst; medians in docs/bench.md.
    #[test]
    fn a_change_moves_few_flows() {
        for (n, bound) in
            [(2, 0.0), (3, 0.005), (7, 0.013), (10, 0.01), (38, 0.013), (39, 0.01), (100, 0.01), (1000, 0.01)]
        {
            let backends: Vec<_> = (0..n).map(backend).collect();
            let index = index_for(backends.len());
            let before = table(&backends, index);
            for gone in (0..n).step_by((n as usize / 10).max(1)) {
                let mut fewer = backends.clone();
                let gone = fewer.remove(gone as usize);
                let moved = moved(&before, &table(&fewer, index), gone);
                assert!(moved <= bound, "{n} backends: {moved} of the flows of the others move");
            }
        }
    }
}
