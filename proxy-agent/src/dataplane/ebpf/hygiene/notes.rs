//! What our programs noted in sockets (`peers`), read for all sockets of the machine at once: by an iterator over the map (kernel
//! 5.9, 5ce6e77c7edf), whose few instructions are made here. They know no map and no type of ours, so no object is needed.
//!
//! User space alone could ask for the note of a socket that it holds open, and the socket dump leaves notes out for UDP.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use aya::Pod;

use super::types::Kernel;
use crate::dataplane::ebpf::sys;

/// `struct bpf_insn`.
const fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> [u8; 8] {
    let ([o0, o1], [i0, i1, i2, i3]) = (offset.to_le_bytes(), immediate.to_le_bytes());
    [code, src << 4 | dst, o0, o1, i0, i1, i2, i3]
}

/// For each socket with a note that is not closed: its cookie (8 bytes) and the note (`size` bytes). `state`: where a socket's state
/// is.
///
/// A socket that was destroyed or disconnected keeps its note, and is in the same state as a new one.
const fn program(size: i32, state: i16) -> [[u8; 8]; 21] {
    const TCP_CLOSE: i32 = 7;
    const LOAD: u8 = 0x79;
    const LOAD_BYTE: u8 = 0x71;
    const STORE: u8 = 0x7b;
    const MOVE: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const IF: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const GET_SOCKET_COOKIE: i32 = 46;
    const SEQ_WRITE: i32 = 127;
    [
        // struct { meta; map; sk; value }; the last call of a round has neither socket nor value.
        instruction(LOAD, 8, 1, 0, 0),
        instruction(LOAD, 7, 1, 24, 0),
        instruction(LOAD, 1, 1, 16, 0),
        instruction(IF, 1, 0, 15, 0),
        instruction(IF, 7, 0, 14, 0),
        instruction(LOAD_BYTE, 2, 1, state, 0),
        instruction(IF, 2, 0, 12, TCP_CLOSE),
        instruction(LOAD, 8, 8, 0, 0),
        instruction(CALL, 0, 0, 0, GET_SOCKET_COOKIE),
        instruction(STORE, 10, 0, -8, 0),
        instruction(MOVE, 1, 8, 0, 0),
        instruction(MOVE, 2, 10, 0, 0),
        instruction(ADD, 2, 0, 0, -8),
        instruction(SET, 3, 0, 0, 8),
        instruction(CALL, 0, 0, 0, SEQ_WRITE),
        instruction(MOVE, 1, 8, 0, 0),
        instruction(MOVE, 2, 7, 0, 0),
        instruction(SET, 3, 0, 0, size),
        instruction(CALL, 0, 0, 0, SEQ_WRITE),
        instruction(SET, 0, 0, 0, 0),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// An iterator over one map of notes.
#[derive(Debug)]
pub(super) struct Reader {
    program: OwnedFd,
    size: usize,
}

impl Reader {
    /// For maps whose values are `N`s.
    pub(super) fn new<N: Pod>(kernel: &Kernel) -> io::Result<Self> {
        let Kernel { hook, state } = *kernel;
        let size = size_of::<N>();
        let instructions = program(i32::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?, state);
        Ok(Self { program: sys::load_iterator(instructions.as_flattened(), hook)?, size })
    }

    /// Calls `each` with the cookie and the note of every socket that `map` knows.
    pub(super) fn each<N: Pod>(&self, map: BorrowedFd<'_>, mut each: impl FnMut(u64, N)) -> io::Result<()> {
        let mut bytes = Vec::new();
        File::from(sys::iterate(self.program.as_fd(), map)?).read_to_end(&mut bytes)?;
        if size_of::<N>() != self.size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for entry in bytes.chunks_exact(8 + self.size) {
            let Some((cookie, note)) = entry.split_first_chunk() else { continue };
            // SAFETY: as long as the type, see above, and read unaligned; `Pod`: every bit pattern is valid.
            each(u64::from_ne_bytes(*cookie), unsafe { std::ptr::read_unaligned(note.as_ptr().cast()) });
        }
        Ok(())
    }
}
