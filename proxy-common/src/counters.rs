//! What is counted: per service, and per reason.

use core::mem::size_of;

use crate::pod;

/// Value of `service_counters` (per-CPU hash, key: service id): written by the programs, summed by readers.
///
/// An entry appears with the first connection; the agent removes it with the service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct ServiceCounters {
    /// New connections (TCP) and flows (UDP), translated at connect time or per packet.
    pub connections: u64,
    /// Packets that the per-packet path translated, both directions. Connect-time traffic passes no program.
    pub packets: u64,
    /// Bytes of those, as the hook sees them (link header included).
    pub bytes: u64,
    /// Connections refused or dropped by verdict.
    pub refused: u64,
    /// This CPU's round-robin cursor: those connections that were sent where they went by turns, and not by what session affinity
    /// remembers of their client.
    pub turns: u64,
}

/// Value of `confirmed` (per-CPU array, one element): flows that moved on to where those are that both sides have spoken on, a masqueraded one
/// counted twice, for each of its pairs. Written by the programs; from the sum over CPUs the agent tells that the tables may be filling up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Confirmed {
    pub established_v4: u64,
    pub established_v6: u64,
    pub answered_v4: u64,
    pub answered_v6: u64,
}

/// Value of `spare` (array; 0 for `established_v4`, 1 for `established_v6`): how much may still come into the table before it evicts what lives.
/// Written by the agent, which knows what is over; the programs subtract. Aligned words, each read and written by itself.
///
/// Not of UDP: a question that was answered holds its place for minutes, and to lose it costs nobody anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Spare {
    /// Entries. At zero and below no flow is opened for the table.
    pub entries: i64,
    /// So many more are there for flows that were opened before that, and are confirmed now.
    pub reserve: i64,
    /// Second of the connection table's clock up to which that holds. Later no agent is there to say so, and the table makes room as
    /// LRU maps do.
    pub until: u64,
}

impl Spare {
    /// Elements of the map.
    pub const TABLES: usize = 2;
}

/// Why something was dropped, refused, repaired or left alone: the index into `reasons` (per-CPU array of `u64`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Reason {
    /// No endpoint: the caller was refused (contract A81).
    Rejected = 0,
    /// The verdict says drop: endpoints exist, none where the policy allows (contract A83, A84).
    PolicyDrop = 1,
    /// No masquerade port free towards that backend.
    MasqueradeExhausted = 2,
    /// The egress device has no address to masquerade with.
    NoMasqueradeAddress = 3,
    /// A map refused an insert (full or out of memory); the packet was dropped.
    InsertFailed = 4,
    /// A helper failed while the packet was rewritten; the packet was dropped.
    RewriteFailed = 5,
    /// A refusal could not be built; the packet was dropped instead.
    RejectFailed = 6,
    /// A value did not match its seal; it was looked up again, or a flow's note was taken for none and made anew.
    TornRead = 7,
    /// A frontend did not match its seal at second sight either, or its slots not its generation: the packet was dropped, the
    /// socket refused.
    TornTwice = 8,
    /// A slot was of another generation than its frontend.
    StaleSlot = 9,
    /// A flow got another source port because its reply tuple was taken.
    PortRemapped = 10,
    /// The missing half of a connection's entries was put back.
    PairRepaired = 11,
    /// A fragment whose first part was not seen; left to the stack, unless it is for an address of ours.
    UnknownFragment = 12,
    /// A header that the parser does not understand; left to the stack.
    Unparsed = 13,
    /// A TCP packet towards an address of ours (one with a guard) that is no SYN and has no connection; left to the stack, since
    /// another proxy may know it.
    NotASyn = 14,
    /// No source port was left for a flow whose reply tuple was taken.
    RemapExhausted = 15,
    /// A socket's VIP could not be noted down: the connection works, but shows its backend instead.
    NotRemembered = 16,
    /// A later fragment for an address of ours whose first one was refused, dropped or not seen; dropped, though the agent may have a copy of it.
    StrayFragment = 17,
    /// Asks for an address of ours from one that asks nothing: of the loopback network, or one of ours; dropped.
    Martian = 18,
    /// A refusal beyond the rate; the packet was dropped in silence.
    RejectLimited = 19,
    /// For an address of ours, untranslated, and about to leave the node; dropped.
    Unserved = 20,
    /// A new flow from outside the ranges that its frontend may be asked from (contract A91); dropped.
    SourceRange = 21,
    /// A packet that XDP sent on past the stack.
    Bypassed = 22,
    /// The same as [`NotASyn`](Self::NotASyn) where nobody else translates: its connection has lost its entries. Reset.
    LostConnection = 23,
    /// A new flow for which its table has no room, but by cutting one that is open; dropped.
    TableFull = 24,
    /// A fragment that came before its datagram's first one; the agent keeps a copy until that comes.
    HeldFragment = 25,
    /// One of those, put back where it came from after its first.
    ReturnedFragment = 26,
}

impl Reason {
    pub const COUNT: usize = 27;

    pub const ALL: [Self; Self::COUNT] = [
        Self::Rejected,
        Self::PolicyDrop,
        Self::MasqueradeExhausted,
        Self::NoMasqueradeAddress,
        Self::InsertFailed,
        Self::RewriteFailed,
        Self::RejectFailed,
        Self::TornRead,
        Self::TornTwice,
        Self::StaleSlot,
        Self::PortRemapped,
        Self::PairRepaired,
        Self::UnknownFragment,
        Self::Unparsed,
        Self::NotASyn,
        Self::RemapExhausted,
        Self::NotRemembered,
        Self::StrayFragment,
        Self::Martian,
        Self::RejectLimited,
        Self::Unserved,
        Self::SourceRange,
        Self::Bypassed,
        Self::LostConnection,
        Self::TableFull,
        Self::HeldFragment,
        Self::ReturnedFragment,
    ];

    /// Name in metrics and in the CLI.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::PolicyDrop => "policy_drop",
            Self::MasqueradeExhausted => "masquerade_ports_exhausted",
            Self::NoMasqueradeAddress => "no_masquerade_address",
            Self::InsertFailed => "insert_failed",
            Self::RewriteFailed => "rewrite_failed",
            Self::RejectFailed => "reject_failed",
            Self::TornRead => "torn_read",
            Self::TornTwice => "torn_twice",
            Self::StaleSlot => "stale_slot",
            Self::PortRemapped => "port_remapped",
            Self::PairRepaired => "pair_repaired",
            Self::UnknownFragment => "unknown_fragment",
            Self::Unparsed => "unparsed",
            Self::NotASyn => "not_a_syn",
            Self::RemapExhausted => "remap_exhausted",
            Self::NotRemembered => "not_remembered",
            Self::StrayFragment => "stray_fragment",
            Self::Martian => "martian",
            Self::RejectLimited => "reject_limited",
            Self::Unserved => "unserved",
            Self::SourceRange => "source_range",
            Self::Bypassed => "bypassed",
            Self::LostConnection => "lost_connection",
            Self::TableFull => "table_full",
            Self::HeldFragment => "held_fragment",
            Self::ReturnedFragment => "returned_fragment",
        }
    }

    /// Whether the packet or the connection was lost to its sender (else it is a note, or was left to the stack).
    pub const fn is_drop(self) -> bool {
        matches!(
            self,
            Self::Rejected
                | Self::PolicyDrop
                | Self::MasqueradeExhausted
                | Self::NoMasqueradeAddress
                | Self::InsertFailed
                | Self::RewriteFailed
                | Self::RejectFailed
                | Self::TornTwice
                | Self::RemapExhausted
                | Self::StrayFragment
                | Self::Martian
                | Self::RejectLimited
                | Self::Unserved
                | Self::SourceRange
                | Self::LostConnection
                | Self::TableFull
        )
    }
}

const _: () = assert!(size_of::<ServiceCounters>() == 40);
const _: () = assert!(size_of::<Confirmed>() == 32);
const _: () = assert!(size_of::<Spare>() == 24);
pod!(ServiceCounters, Confirmed, Spare);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_indexed_in_order() {
        for (i, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, i);
        }
    }
}
