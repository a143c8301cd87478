//! Netlink messages as bytes: the header, one after the other, and how an exchange went.
//!
//! Our own, and no crate's: conntrack, nftables and IPVS are asked a dozen things, by threads that wait for the answer. The crates for them come with an
//! asynchronous connection and have to be of versions that match each other's and rtnetlink's; that for IPVS does not.

use std::io;

pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLMSG_ERROR: u16 = 2;
pub(crate) const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;

/// One request. Sequence number and port are nought: one is out at a time.
pub(crate) fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = HEADER + body.len();
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&(length as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.resize(HEADER, 0);
    message.extend_from_slice(body);
    message
}

/// The first message: its type, what is in it, and what comes after it.
pub(crate) fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let message = bytes.get(HEADER..length)?;
    Some((kind, message, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// What `NLMSG_ERROR` and `NLMSG_DONE` say; nothing if all went well.
pub(crate) fn error(message: &[u8]) -> Option<io::Error> {
    let code = message.first_chunk().map_or(-libc::EINVAL, |code| i32::from_ne_bytes(*code));
    (code != 0).then(|| io::Error::from_raw_os_error(-code))
}

/// Attributes of a message, one after the other: type without flags, and what is in it.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & 0x3fff, value))
    })
}

/// One attribute, padded; `kind` with its flags.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = Vec::with_capacity(length.next_multiple_of(4));
    bytes.extend_from_slice(&(length as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_follow_one_another() {
        let code = (-libc::ENOENT).to_ne_bytes();
        let both = [message(20, 0, b"1234"), message(NLMSG_ERROR, 0, &code)].concat();
        let (kind, body, rest) = split(&both).unwrap();
        assert_eq!((kind, body), (20, b"1234".as_slice()));
        let (kind, body, rest) = split(rest).unwrap();
        assert_eq!((kind, error(body).unwrap().raw_os_error()), (NLMSG_ERROR, Some(libc::ENOENT)));
        assert!(rest.is_empty() && split(rest).is_none());
        assert!(error(&0_i32.to_ne_bytes()).is_none());
    }

    #[test]
    fn attributes_follow_one_another() {
        let bytes = [attribute(1, b"12345"), attribute(2 | 0x8000, &attribute(3, b"ab"))].concat();
        let all: Vec<_> = attributes(&bytes).collect();
        assert_eq!(all[0], (1, b"12345".as_slice()));
        assert_eq!(all[1].0, 2);
        assert_eq!(attributes(all[1].1).collect::<Vec<_>>(), [(3, b"ab".as_slice())]);
        assert_eq!(attributes(&[200, 0, 1, 0, 7]).count(), 0, "a length that lies");
    }
}
