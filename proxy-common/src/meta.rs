//! Two maps that no program reads: `meta` says which object and settings are in force, `names` what a service id means.

use core::mem::size_of;

use crate::pod;

/// The one value of `meta` (array, key 0): what the pinned programs were loaded as. Written by the agent after it attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Meta {
    /// [`crate::LAYOUT_VERSION`].
    pub layout: u32,
    pub pad: u32,
    /// Digest of the object file and of every global it was loaded with; a restart with the same digest swaps nothing.
    pub programs: u64,
    pub node_netns_cookie: u64,
}

/// Longest `namespace/name:port`: 63 + 1 + 63 + 1 + 63, rounded up.
pub const NAME_LEN: usize = 192;

/// Value of `names` (hash, key: service id): `namespace/name:port`, UTF-8, padded with zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ServiceName(pub [u8; NAME_LEN]);

impl ServiceName {
    /// Cuts what does not fit (nothing that the API server accepts is that long).
    pub fn new(name: &str) -> Self {
        let mut bytes = [0; NAME_LEN];
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self(bytes)
    }

    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(NAME_LEN);
        core::str::from_utf8(self.0.get(..end).unwrap_or_default()).unwrap_or("?")
    }
}

const _: () = assert!(size_of::<Meta>() == 24);
const _: () = assert!(size_of::<ServiceName>() == 192);
pod!(Meta, ServiceName);
