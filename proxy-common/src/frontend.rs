//! `frontends`: (address, port, protocol) → what to do with a packet or a socket that aims there.

use core::mem::{offset_of, size_of};

use crate::{Address, Be16, Ipv4Be, Ipv6Be, pod, seal::Seal};

/// Key of the frontends map.
///
/// `port` 0 with `proto` 0 is the *guard* of an address: what holds for it where no frontend claims the port or the
/// protocol (a ClusterIP on an unused port is refused, contract A48).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct FrontendKey<A> {
    pub addr: A,
    pub port: Be16,
    pub proto: u8,
    pub pad: u8,
}

impl<A: Address> FrontendKey<A> {
    #[inline(always)]
    pub const fn new(addr: A, port: Be16, proto: u8) -> Self {
        Self { addr, port, proto, pad: 0 }
    }

    #[inline(always)]
    pub const fn guard(addr: A) -> Self {
        Self::new(addr, Be16::ZERO, 0)
    }

    pub fn is_guard(&self) -> bool {
        self.port == Be16::ZERO && self.proto == 0
    }

    #[inline(always)]
    fn seal(&self) -> Seal {
        let (hi, lo) = self.addr.words();
        let rest = ((self.port.0 as u64) << 16) | ((self.proto as u64) << 8) | self.pad as u64;
        if A::LEN == 4 { Seal::new().word(hi << 32 | rest) } else { Seal::new().word(hi).word(lo).word(rest) }
    }
}

/// What one verdict byte says: the action in the low bits, [`MASQUERADE`](verdict::MASQUERADE) above.
pub mod verdict {
    /// Pick from the *all* range.
    pub const PICK_ALL: u8 = 0;
    /// Pick from the *local* range.
    pub const PICK_LOCAL: u8 = 1;
    /// Drop silently (contract A83, A84).
    pub const DROP: u8 = 2;
    /// Refuse: ECONNREFUSED at connect time, ICMP port unreachable per packet (contract A81).
    pub const REJECT: u8 = 3;
    /// Not for this origin: what aims here goes on untouched (a localhost NodePort asked from outside).
    pub const PASS: u8 = 4;

    pub const ACTION_MASK: u8 = 0x07;
    /// The backend sees the node's address (contract A63).
    pub const MASQUERADE: u8 = 0x80;
}

/// Where a packet or a socket comes from: the index into [`FrontendValue::verdicts`].
pub mod origin {
    pub const POD: usize = 0;
    pub const NODE: usize = 1;
    pub const EXTERNAL: usize = 2;
    pub const COUNT: usize = 3;
}

pub mod algorithm {
    pub const RANDOM: u8 = 0;
    /// Per CPU: each CPU walks the range on its own.
    pub const ROUND_ROBIN: u8 = 1;
    /// By a hash of the flow, see [`maglev`](crate::maglev).
    pub const MAGLEV: u8 = 2;
}

/// [`FrontendValue::flags`].
pub mod flags {
    /// What kind of address the frontend is, for readers; programs treat all alike.
    pub const KIND_MASK: u16 = 0x0003;
    pub const CLUSTER_IP: u16 = 0;
    pub const NODE_PORT: u16 = 1;
    pub const EXTERNAL_IP: u16 = 2;
    pub const LOAD_BALANCER: u16 = 3;

    /// New flows come from the ranges of `source_ranges` alone (contract A8).
    pub const HAS_SOURCE_RANGES: u16 = 0x0004;

    /// Pods' connections are left to their packets: their Service asks for that; or they may have to be reset, and where pods' sockets are out
    /// of the agent's reach that is the only way.
    pub const PODS_PER_PACKET: u16 = 0x0008;

    /// Which Maglev table stands behind the slots of the *all* range, and of the *local* one.
    pub const ALL_TABLE_SHIFT: u16 = 4;
    pub const LOCAL_TABLE_SHIFT: u16 = 8;
    pub const TABLE_MASK: u16 = 0x000f;
}

/// A run of slots: `count` of them from `base`, each carrying generation `generation`, and behind them those of its table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Range {
    pub base: u32,
    pub count: u16,
    /// A slot of another generation was re-used: the reader looks the frontend up again. 0 is never a generation.
    pub generation: u8,
    /// Index of its Maglev table's size ([`maglev::size`](crate::maglev::size)); 0: it has none.
    pub table: u8,
}

impl Range {
    /// Slots it takes, those of the table included.
    #[inline(always)]
    pub const fn slots(&self) -> u32 {
        self.count as u32 + crate::maglev::size(self.table)
    }
}

/// Value of the frontends map; written by the agent in one update, so ranges and verdicts swap together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct FrontendValue {
    pub all_base: u32,
    pub local_base: u32,
    pub all_count: u16,
    pub local_count: u16,
    /// Index into `names`, key of `service_counters`; never 0.
    pub service: u32,
    /// One byte for each [`origin`].
    pub verdicts: [u8; origin::COUNT],
    pub algorithm: u8,
    pub all_generation: u8,
    pub local_generation: u8,
    /// [`flags`]; bits without a name are zero.
    pub flags: u16,
    /// Session affinity time-out in seconds; 0: none.
    pub affinity_secs: u32,
    pub seal: u32,
}

impl FrontendValue {
    #[inline(always)]
    pub const fn all(&self) -> Range {
        Range {
            base: self.all_base,
            count: self.all_count,
            generation: self.all_generation,
            table: ((self.flags >> flags::ALL_TABLE_SHIFT) & flags::TABLE_MASK) as u8,
        }
    }

    #[inline(always)]
    pub const fn local(&self) -> Range {
        Range {
            base: self.local_base,
            count: self.local_count,
            generation: self.local_generation,
            table: ((self.flags >> flags::LOCAL_TABLE_SHIFT) & flags::TABLE_MASK) as u8,
        }
    }

    /// The verdict for `origin`. Shifted out of a word: an array on the stack indexed by a variable becomes pointer
    /// arithmetic that the verifier does not allow.
    #[inline(always)]
    pub const fn verdict(&self, origin: usize) -> u8 {
        let [a, b, c] = self.verdicts;
        (u32::from_le_bytes([a, b, c, verdict::DROP]) >> ((origin as u32 & 3) * 8)) as u8
    }

    /// The seal that this value must carry under `key`.
    #[inline(always)]
    pub fn seal_for<A: Address>(&self, key: &FrontendKey<A>) -> u32 {
        key.seal()
            .word((self.all_base as u64) << 32 | self.local_base as u64)
            .word((self.service as u64) << 32 | (self.all_count as u64) << 16 | self.local_count as u64)
            .word(
                (self.verdicts[0] as u64) << 56
                    | (self.verdicts[1] as u64) << 48
                    | (self.verdicts[2] as u64) << 40
                    | (self.algorithm as u64) << 32
                    | (self.all_generation as u64) << 24
                    | (self.local_generation as u64) << 16
                    | self.flags as u64,
            )
            .word(self.affinity_secs as u64)
            .finish()
    }

    #[must_use]
    pub fn sealed<A: Address>(mut self, key: &FrontendKey<A>) -> Self {
        self.seal = self.seal_for(key);
        self
    }

    #[inline(always)]
    pub fn is_sealed_for<A: Address>(&self, key: &FrontendKey<A>) -> bool {
        self.seal == self.seal_for(key)
    }
}

const _: () = assert!(size_of::<FrontendKey<Ipv4Be>>() == 8);
const _: () = assert!(size_of::<FrontendKey<Ipv6Be>>() == 20);
const _: () = assert!(size_of::<FrontendValue>() == 32);
const _: () = assert!(offset_of!(FrontendValue, verdicts) == 16);
const _: () = assert!(offset_of!(FrontendValue, seal) == 28);
pod!(FrontendKey<Ipv4Be>, FrontendKey<Ipv6Be>, FrontendValue);

#[cfg(test)]
mod tests {
    use super::*;

    fn value() -> FrontendValue {
        FrontendValue { all_base: 7, all_count: 3, service: 9, all_generation: 1, ..Default::default() }
    }

    #[test]
    fn a_seal_belongs_to_one_key() {
        let key = FrontendKey::new(Ipv4Be::from_octets([10, 96, 0, 1]), Be16::from_host(80), crate::proto::TCP);
        let sealed = value().sealed(&key);
        assert!(sealed.is_sealed_for(&key));
        assert!(!sealed.is_sealed_for(&FrontendKey { proto: crate::proto::UDP, ..key }));
        assert!(!sealed.is_sealed_for(&FrontendKey { port: Be16::from_host(81), ..key }));
        assert!(!FrontendValue::default().is_sealed_for(&key));
    }

    #[test]
    fn verdicts_are_told_by_origin() {
        let value = FrontendValue { verdicts: [verdict::PICK_LOCAL, verdict::REJECT, 0x80], ..value() };
        assert_eq!(value.verdict(origin::POD), verdict::PICK_LOCAL);
        assert_eq!(value.verdict(origin::NODE), verdict::REJECT);
        assert_eq!(value.verdict(origin::EXTERNAL), 0x80);
        assert_eq!(value.verdict(3), verdict::DROP, "no origin");
    }

    #[test]
    fn flags_name_the_table_of_each_range() {
        let value = FrontendValue { flags: 0xf32f, all_count: 5, local_count: 2, ..value() };
        assert_eq!((value.all().table, value.local().table), (2, 3));
        assert_eq!((value.all().slots(), value.local().slots()), (5 + 16_381, 2 + 65_521));
        assert_eq!(FrontendValue { flags: 0xf00f, ..value }.all().slots(), 5);
    }

    #[test]
    fn every_field_is_under_the_seal() {
        let key = FrontendKey::guard(Ipv6Be([1, 2, 3, 4]));
        let sealed = value().sealed(&key);
        let mutations: [fn(&mut FrontendValue); 13] = [
            |v| v.all_base += 1,
            |v| v.local_base += 1,
            |v| v.all_count += 1,
            |v| v.local_count += 1,
            |v| v.service += 1,
            |v| v.verdicts[0] += 1,
            |v| v.verdicts[1] += 1,
            |v| v.verdicts[2] += 1,
            |v| v.algorithm += 1,
            |v| v.all_generation += 1,
            |v| v.local_generation += 1,
            |v| v.flags += 1,
            |v| v.affinity_secs += 1,
        ];
        for mutate in mutations {
            let mut other = sealed;
            mutate(&mut other);
            assert!(!other.is_sealed_for(&key), "{other:?}");
        }
    }
}
