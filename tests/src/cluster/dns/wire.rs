//! Questions and answers of DNS (RFC 1035), as far as a resolver in a pod asks them.

use std::net::{IpAddr, Ipv4Addr};

pub(super) const A: u16 = 1;
pub(super) const CNAME: u16 = 5;
pub(super) const AAAA: u16 = 28;
pub(super) const SRV: u16 = 33;

/// One question. Labels in lower case.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Question {
    id: u16,
    recursion: bool,
    pub(super) labels: Vec<String>,
    pub(super) kind: u16,
    /// As it was asked, to be sent back.
    section: Vec<u8>,
}

pub(super) enum Record {
    Address(IpAddr),
    Alias(String),
    /// Port and target; the records of equal priority and weight.
    Service(u16, String),
}

#[derive(Clone, Copy)]
pub(super) enum Code {
    Known = 0,
    Unknown = 3,
}

impl Question {
    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        let header = message.get(..12)?;
        let flags = u16::from_be_bytes([header[2], header[3]]);
        let is_query = flags & 0x8000 == 0;
        let one = u16::from_be_bytes([header[4], header[5]]) == 1;
        if !is_query || !one {
            return None;
        }
        let mut at = 12;
        let mut labels = Vec::new();
        loop {
            let length = usize::from(*message.get(at)?);
            if length == 0 {
                break;
            }
            // Nothing before it could be pointed to.
            if length > 63 {
                return None;
            }
            let label = message.get(at + 1..=at + length)?;
            labels.push(String::from_utf8_lossy(label).to_lowercase());
            at += 1 + length;
        }
        let kind = u16::from_be_bytes(message.get(at + 1..at + 3)?.try_into().ok()?);
        let section = message.get(12..at + 5)?.to_vec();
        let id = u16::from_be_bytes([header[0], header[1]]);
        Some(Self { id, recursion: flags & 0x0100 != 0, labels, kind, section })
    }

    pub(super) fn answer(&self, code: Code, records: &[Record]) -> Vec<u8> {
        // A response, authoritative, with recursion where that was wanted: a resolver that gets less asks elsewhere.
        let flags = 0x8480 | if self.recursion { 0x0100 } else { 0 } | code as u16;
        let mut message = Vec::new();
        for word in [self.id, flags, 1, u16::try_from(records.len()).unwrap_or(u16::MAX), 0, 0] {
            message.extend(word.to_be_bytes());
        }
        message.extend(&self.section);
        // The question's name; what follows an alias is of the name that it leads to.
        let mut owner = vec![0xc0, 12];
        for record in records {
            let (kind, data) = match record {
                Record::Address(IpAddr::V4(address)) => (A, address.octets().to_vec()),
                Record::Address(IpAddr::V6(address)) => (AAAA, address.octets().to_vec()),
                Record::Alias(name) => (CNAME, encode(name)),
                Record::Service(port, target) => {
                    let words = [0, 100, *port].into_iter().flat_map(u16::to_be_bytes);
                    (SRV, words.chain(encode(target)).collect())
                }
            };
            message.extend(&owner);
            // Class IN; known for a second.
            for word in [kind, 1, 0, 1, u16::try_from(data.len()).unwrap_or(u16::MAX)] {
                message.extend(word.to_be_bytes());
            }
            if kind == CNAME {
                owner.clone_from(&data);
            }
            message.extend(data);
        }
        message
    }
}

fn encode(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend(label.bytes().take(63));
    }
    bytes.push(0);
    bytes
}

/// `10-56-1-2`, of the name of a pod.
pub(super) fn dashed(label: &str) -> Option<Ipv4Addr> {
    label.replace('-', ".").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        message.extend(encode(name));
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    #[test]
    fn what_is_asked_is_understood_and_answered() {
        let question = Question::parse(&query("Web.default.svc.cluster.local", A)).unwrap();
        assert_eq!(question.labels.join("."), "web.default.svc.cluster.local");
        let answer = question.answer(Code::Known, &[Record::Address(Ipv4Addr::new(10, 96, 0, 7).into())]);
        assert_eq!(answer[..12], [0x12, 0x34, 0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        assert_eq!(answer[answer.len() - 16..], [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 10, 96, 0, 7]);
    }

    #[test]
    fn what_is_cut_short_is_no_question() {
        let whole = query("web", A);
        assert!((0..whole.len()).all(|length| Question::parse(&whole[..length]).is_none()));
    }
}
