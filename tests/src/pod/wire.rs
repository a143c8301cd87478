//! What clients and servers say to each other: a request line, an answer line.
//!
//! Request: the number of bytes wanted in the answer, a blank, padding, a newline. Answer: [`Answer`] as one line of JSON,
//! padded. A UDP datagram carries one of either. A connection whose request begins with [`LAST`] is ended by the server.

use serde::{Deserialize, Serialize};

/// Who answered, and what it saw.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Answer {
    pub backend: String,
    /// Source address and port as the server sees them.
    pub peer: String,
    /// The server's own end of the connection.
    pub local: String,
    /// Length of the request.
    pub got: usize,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pad: String,
}

/// In front of a request after whose answer the server closes the connection.
pub const LAST: &[u8; 5] = b"LAST ";

/// A request of at least `size` bytes that asks for an answer of at least `reply` bytes.
pub fn request(size: usize, reply: usize) -> Vec<u8> {
    let mut line = format!("{reply} ").into_bytes();
    while line.len() + 1 < size {
        line.push(b'x');
    }
    line.push(b'\n');
    line
}

/// The answer to `request`, as bytes to send.
pub fn answer(backend: &str, peer: &str, local: &str, request: &[u8]) -> Vec<u8> {
    let wanted = request
        .split(|&byte| byte == b' ' || byte == b'\n')
        .next()
        .and_then(|word| str::from_utf8(word).ok())
        .and_then(|word| word.parse().ok())
        .unwrap_or(0);
    let mut answer = Answer {
        backend: backend.to_owned(),
        peer: peer.to_owned(),
        local: local.to_owned(),
        got: request.len(),
        pad: String::new(),
    };
    let bare = encode(&answer);
    if bare.len() >= wanted {
        return bare;
    }
    answer.pad = "y".repeat(wanted - bare.len());
    encode(&answer)
}

pub(super) fn encode(answer: &Answer) -> Vec<u8> {
    let mut line = serde_json::to_vec(answer).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_at_least_what_was_asked_for() {
        let request = request(8000, 9000);
        assert_eq!(request.len(), 8000);
        let answer = answer("a1", "1.2.3.4:5", "6.7.8.9:10", &request);
        assert!(answer.len() >= 9000, "{}", answer.len());
        let parsed: Answer = serde_json::from_slice(&answer).unwrap();
        assert_eq!((parsed.backend.as_str(), parsed.got), ("a1", 8000));
    }

    #[test]
    fn a_small_request_gets_a_bare_answer() {
        let parsed: Answer = serde_json::from_slice(&answer("b", "p", "l", &request(0, 0))).unwrap();
        assert_eq!(parsed.pad, "");
    }
}
