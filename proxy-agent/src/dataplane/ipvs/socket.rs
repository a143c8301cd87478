//! Asking IPVS, by generic netlink.

use std::{io, path::Path};

use rustix::net::netlink as protocols;

use super::{
    codec::{self, Command, Held, Info, Request, Service, Virtual},
    talk::Talk,
};
use crate::dataplane::netlink::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, attribute, message};

/// `struct genlmsghdr`
const GENERIC: usize = 4;

/// The family that tells the numbers of the others: `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, `CTRL_ATTR_FAMILY_ID`, `CTRL_ATTR_FAMILY_NAME`.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// So many answers fit into a socket's buffer by far, whatever the kernel counts for each.
const AT_ONCE: usize = 64;

/// Of the network namespace that it was opened in.
#[derive(Debug)]
pub struct Socket {
    talk: Talk,
    family: u16,
}

impl Socket {
    /// The kernel loads the module `ip_vs` for who asks. `NotFound`: it has none.
    pub fn open() -> io::Result<Self> {
        let mut socket = Self { talk: Talk::open(Some(protocols::GENERIC))?, family: CONTROL };
        let name = [codec::FAMILY.as_bytes(), &[0]].concat();
        let answers = socket.ask(GET_FAMILY, NLM_F_ACK, &attribute(FAMILY_NAME, &name))?;
        let number = answers.first().and_then(|answer| codec::find(answer, FAMILY_ID)?.first_chunk());
        socket.family = u16::from_ne_bytes(*number.ok_or(io::ErrorKind::InvalidData)?);
        Ok(socket)
    }

    /// Whether the kernel has IPVS loaded, for this network namespace. To open a socket is to load it.
    pub fn is_loaded() -> bool {
        Path::new("/proc/thread-self/net/ip_vs").exists()
    }

    pub fn info(&mut self) -> io::Result<Info> {
        let answers = self.ask(Command::GetInfo as u8, NLM_F_ACK, &[])?;
        let info = answers.first().and_then(|answer| codec::read_info(answer));
        info.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Every virtual service of this namespace but those that we cannot have made.
    pub fn services(&mut self) -> io::Result<Vec<Service>> {
        let answers = self.ask(Command::GetService as u8, NLM_F_DUMP, &[])?;
        Ok(answers.iter().filter_map(|answer| codec::read_service(answer)).collect())
    }

    /// One of them; `None`: there is none there.
    pub fn service(&mut self, at: Virtual) -> io::Result<Option<Service>> {
        match self.ask(Command::GetService as u8, NLM_F_ACK, &codec::service(at)) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            answers => Ok(answers?.iter().find_map(|answer| codec::read_service(answer))),
        }
    }

    pub fn destinations(&mut self, of: Virtual) -> io::Result<Vec<Held>> {
        let answers = self.ask(Command::GetDest as u8, NLM_F_DUMP, &codec::service(of))?;
        Ok(answers.iter().filter_map(|answer| codec::read_destination(answer, of.family())).collect())
    }

    /// Carries out one after the other; how each went. An error of its own: how far it came is not known.
    pub fn run(&mut self, requests: &[Request]) -> io::Result<Vec<io::Result<()>>> {
        let mut outcomes = Vec::with_capacity(requests.len());
        for some in requests.chunks(AT_ONCE) {
            let message = |request: &Request| {
                let body = Self::body(request.command() as u8, &request.attributes());
                message(self.family, NLM_F_REQUEST | NLM_F_ACK, &body)
            };
            outcomes.extend(self.talk.run(some.iter().map(message))?);
        }
        Ok(outcomes)
    }

    /// One question; the attributes of each answer.
    fn ask(&self, command: u8, flags: u16, attributes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let answers = self.talk.ask(self.family, NLM_F_REQUEST | flags, &Self::body(command, attributes))?;
        Ok(answers.iter().filter_map(|answer| answer.get(GENERIC..).map(<[u8]>::to_vec)).collect())
    }

    fn body(command: u8, attributes: &[u8]) -> Vec<u8> {
        [&[command, codec::VERSION, 0, 0], attributes].concat()
    }
}
