//! A conversation by netlink: one question at a time, and answers to nothing else.
//!
//! Questions are numbered. What was queued when an earlier one failed in the midst (a full buffer) answers that one, and is skipped.

use std::{cell::Cell, io, os::fd::OwnedFd};

use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::dataplane::netlink::{NLMSG_DONE, NLMSG_ERROR, error, message, split};

/// Where a message's flags and number stand.
const FLAGS: usize = 6;
const NUMBER: usize = 8;
/// `NLM_F_DUMP_INTR`: what is listed changed meanwhile, so something may be missing.
const INTERRUPTED: u16 = 0x10;
/// A list that changes all the time is taken as it is in the end.
const TRIES: u32 = 5;

/// Of the network namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Talk {
    fd: OwnedFd,
    last: Cell<u32>,
}

impl Talk {
    pub(super) fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        Ok(Self::over(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?))
    }

    const fn over(fd: OwnedFd) -> Self {
        Self { fd, last: Cell::new(0) }
    }

    /// One question; the body of each answer.
    pub(super) fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        for _ in 1..TRIES {
            let (answers, interrupted) = self.ask_once(kind, flags, body)?;
            if !interrupted {
                return Ok(answers);
            }
        }
        Ok(self.ask_once(kind, flags, body)?.0)
    }

    /// And whether something changed meanwhile.
    fn ask_once(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<(Vec<Vec<u8>>, bool)> {
        let (number, question) = self.numbered(message(kind, flags, body));
        self.send(&question)?;
        let (mut answers, mut end, mut interrupted) = (Vec::new(), None, false);
        while end.is_none() {
            self.receive(|of, flags, kind, message| {
                if of != number {
                    return;
                }
                interrupted |= flags & INTERRUPTED != 0;
                match kind {
                    // A list ends by the one, everything else, once answered, by the other.
                    NLMSG_DONE | NLMSG_ERROR => end = Some(error(message)),
                    _ => answers.push(message.to_vec()),
                }
            })?;
        }
        end.flatten().map_or(Ok((answers, interrupted)), Err)
    }

    /// Has them carried out one after the other; how each went. An error of its own: how far it came is not known.
    pub(super) fn run(&self, requests: impl Iterator<Item = Vec<u8>>) -> io::Result<Vec<io::Result<()>>> {
        let first = self.last.get().wrapping_add(1);
        let requests: Vec<Vec<u8>> = requests.map(|request| self.numbered(request).1).collect();
        self.send(&requests.concat())?;
        // They are carried out, and acknowledged, in this order.
        let mut outcomes = Vec::with_capacity(requests.len());
        while outcomes.len() < requests.len() {
            self.receive(|of, _, kind, message| {
                if kind == NLMSG_ERROR && of.wrapping_sub(first) as usize == outcomes.len() {
                    outcomes.push(error(message).map_or(Ok(()), Err));
                }
            })?;
        }
        Ok(outcomes)
    }

    fn numbered(&self, mut message: Vec<u8>) -> (u32, Vec<u8>) {
        let number = self.last.get().wrapping_add(1);
        self.last.set(number);
        if let Some(field) = message.get_mut(NUMBER..NUMBER + 4) {
            field.copy_from_slice(&number.to_ne_bytes());
        }
        (number, message)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::net::send(&self.fd, bytes, SendFlags::empty()))?;
        Ok(())
    }

    /// What came by one packet: number, flags, kind and rest of each message.
    fn receive(&self, mut each: impl FnMut(u32, u16, u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0_u8; 64 * 1024];
        let (_, length) =
            rustix::io::retry_on_intr(|| rustix::net::recv(&self.fd, buffer.as_mut_slice(), RecvFlags::empty()))?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some((kind, message, next)) = split(rest) {
            let flags = rest.get(FLAGS..).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or_default();
            let number = rest.get(NUMBER..).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or_default();
            each(u32::from_ne_bytes(number), u16::from_ne_bytes(flags), kind, message);
            rest = next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const ANSWER: u16 = 20;

    fn pair() -> (Talk, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        let (ours, kernel) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Talk::over(ours), kernel)
    }

    fn answer(number: u32, flags: u16, kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = message(kind, flags, body);
        bytes[NUMBER..NUMBER + 4].copy_from_slice(&number.to_ne_bytes());
        bytes
    }

    /// Numbers of the questions of one packet.
    fn questions(kernel: &OwnedFd) -> Vec<u32> {
        let mut buffer = vec![0_u8; 4096];
        let (_, length) = rustix::net::recv(kernel, buffer.as_mut_slice(), RecvFlags::empty()).unwrap();
        let (mut rest, mut numbers) = (&buffer[..length], Vec::new());
        while let Some((_, _, next)) = split(rest) {
            numbers.push(u32::from_ne_bytes(*rest[NUMBER..].first_chunk().unwrap()));
            rest = next;
        }
        numbers
    }

    fn say(kernel: &OwnedFd, bytes: &[u8]) {
        rustix::net::send(kernel, bytes, SendFlags::empty()).unwrap();
    }

    #[test]
    fn answers_to_an_earlier_question_are_skipped() {
        let (talk, kernel) = pair();
        let done = 0_i32.to_ne_bytes();
        let kernel = thread::spawn(move || {
            let number = questions(&kernel)[0];
            let old = number.wrapping_sub(1);
            say(&kernel, &[answer(old, 0, ANSWER, b"old."), answer(old, 0, NLMSG_DONE, &done)].concat());
            say(&kernel, &[answer(number, 0, ANSWER, b"new."), answer(number, 0, NLMSG_DONE, &done)].concat());
            let numbers = questions(&kernel);
            let refused = (-libc::ENOENT).to_ne_bytes();
            say(&kernel, &answer(number, 0, NLMSG_ERROR, &refused));
            say(
                &kernel,
                &[answer(numbers[0], 0, NLMSG_ERROR, &done), answer(numbers[1], 0, NLMSG_ERROR, &refused)].concat(),
            );
        });
        assert_eq!(talk.ask(7, 0, b"").unwrap(), [b"new.".to_vec()]);
        let outcomes = talk.run([message(7, 0, b""), message(7, 0, b"")].into_iter()).unwrap();
        assert!(outcomes[0].is_ok() && outcomes[1].is_err(), "{outcomes:?}");
        kernel.join().unwrap();
    }

    #[test]
    fn a_list_that_changed_meanwhile_is_asked_for_again() {
        let (talk, kernel) = pair();
        let kernel = thread::spawn(move || {
            let done = 0_i32.to_ne_bytes();
            for flags in [INTERRUPTED, 0] {
                let number = questions(&kernel)[0];
                say(&kernel, &[answer(number, flags, ANSWER, b"some"), answer(number, 0, NLMSG_DONE, &done)].concat());
            }
        });
        assert_eq!(talk.ask(7, 0, b"").unwrap(), [b"some".to_vec()]);
        kernel.join().unwrap();
    }
}
