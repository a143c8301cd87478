//! What the dataplane asks of the kernel, so that tests can answer in its place.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    codec::{Held, Request, Service, Virtual},
    device::{Device, Route},
    socket::Socket,
    sysctl::{Settings, Unset},
};

pub(super) trait System: fmt::Debug + Send {
    fn device(&mut self) -> io::Result<Option<Device>>;
    fn create(&mut self, alias: &str) -> io::Result<Device>;
    fn label(&mut self, index: u32, alias: &str) -> io::Result<()>;
    fn raise(&mut self, index: u32) -> io::Result<()>;
    fn addresses(&mut self, index: u32) -> io::Result<BTreeSet<IpAddr>>;
    fn others(&mut self) -> io::Result<Vec<IpNet>>;
    fn neighbours(&mut self) -> io::Result<BTreeMap<IpAddr, Vec<u8>>>;
    fn add(&mut self, index: u32, addr: IpAddr) -> io::Result<()>;
    fn take_off(&mut self, index: u32, addr: IpAddr) -> io::Result<()>;
    fn routed(&mut self, index: u32) -> io::Result<BTreeSet<IpAddr>>;
    fn let_go(&mut self, index: u32, addr: IpAddr) -> io::Result<()>;
    fn services(&mut self) -> io::Result<Vec<Service>>;
    fn service(&mut self, at: Virtual) -> io::Result<Option<Service>>;
    fn destinations(&mut self, at: Virtual) -> io::Result<Vec<Held>>;
    fn run(&mut self, requests: &[Request]) -> io::Result<Vec<io::Result<()>>>;
    fn note(&mut self, before: &str) -> io::Result<String>;
    fn set(&mut self) -> Result<u64, Unset>;
    fn wrong(&mut self) -> Vec<&'static str>;
}

/// Of the network namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) socket: Socket,
    pub(super) route: Route,
    pub(super) strict_arp: bool,
}

impl Kernel {
    fn settings(&self) -> Settings {
        Settings::here().with_strict_arp(self.strict_arp)
    }
}

impl System for Kernel {
    fn device(&mut self) -> io::Result<Option<Device>> {
        self.route.device()
    }

    fn create(&mut self, alias: &str) -> io::Result<Device> {
        self.route.create(alias)
    }

    fn label(&mut self, index: u32, alias: &str) -> io::Result<()> {
        self.route.label(index, alias)
    }

    fn raise(&mut self, index: u32) -> io::Result<()> {
        self.route.raise(index)
    }

    fn addresses(&mut self, index: u32) -> io::Result<BTreeSet<IpAddr>> {
        self.route.addresses(index)
    }

    fn others(&mut self) -> io::Result<Vec<IpNet>> {
        self.route.others()
    }

    fn neighbours(&mut self) -> io::Result<BTreeMap<IpAddr, Vec<u8>>> {
        self.route.neighbours()
    }

    fn add(&mut self, index: u32, addr: IpAddr) -> io::Result<()> {
        self.route.add(index, addr)
    }

    fn take_off(&mut self, index: u32, addr: IpAddr) -> io::Result<()> {
        self.route.take_off(index, addr)
    }

    fn routed(&mut self, index: u32) -> io::Result<BTreeSet<IpAddr>> {
        self.route.routed(index)
    }

    fn let_go(&mut self, index: u32, addr: IpAddr) -> io::Result<()> {
        self.route.let_go(index, addr)
    }

    fn services(&mut self) -> io::Result<Vec<Service>> {
        self.socket.services()
    }

    fn service(&mut self, at: Virtual) -> io::Result<Option<Service>> {
        self.socket.service(at)
    }

    fn destinations(&mut self, at: Virtual) -> io::Result<Vec<Held>> {
        self.socket.destinations(at)
    }

    fn run(&mut self, requests: &[Request]) -> io::Result<Vec<io::Result<()>>> {
        self.socket.run(requests)
    }

    fn note(&mut self, before: &str) -> io::Result<String> {
        self.settings().note(before)
    }

    fn set(&mut self) -> Result<u64, Unset> {
        self.settings().set()
    }

    fn wrong(&mut self) -> Vec<&'static str> {
        self.settings().wrong()
    }
}
