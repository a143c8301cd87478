//! A link without Ethernet headers, as WireGuard or IPIP make one: a TUN device in each of two namespaces, and a thread that
//! carries the packets from one to the other. It needs nothing of the kernel but TUN.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};
use nix::{
    libc,
    poll::{PollFd, PollFlags, poll},
};

use super::Namespace;

/// Ends, and takes the devices with it, when dropped.
pub(super) struct Tunnel {
    stop: Arc<AtomicBool>,
    carrier: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// Makes both ends; they are down and have no addresses.
    pub(super) fn between(ends: [(&Namespace, &str); 2]) -> Result<Self> {
        let [one, other] = ends.map(|(namespace, device)| {
            namespace
                .enter(|| open(device))?
                .with_context(|| format!("make the TUN device {device} in {}", namespace.name()))
        });
        let (one, other) = (one?, other?);
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let carrier = Some(thread::spawn(move || carry(&one, &other, &seen)));
        Ok(Self { stop, carrier })
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(carrier) = self.carrier.take() {
            let _ = carrier.join();
        }
    }
}

fn open(device: &str) -> io::Result<File> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: plain old data; all zeroes is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero behind the name.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the kernel reads and writes a whole ifreq where `request` is one.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun)
}

fn carry(one: &File, other: &File, stop: &AtomicBool) {
    let mut packet = vec![0; 65536];
    while !stop.load(Ordering::Relaxed) {
        let ends = [one, other];
        let mut polled = ends.map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN));
        if poll(&mut polled, 100_u8).is_err() {
            continue;
        }
        let ready = polled.map(|end| end.revents().is_some_and(|events| events.contains(PollFlags::POLLIN)));
        for (ready, (mut from, mut to)) in ready.into_iter().zip([(one, other), (other, one)]) {
            if ready && let Ok(length) = from.read(&mut packet) {
                // An end that is down takes nothing: lost, as on any wire.
                let _ = to.write(packet.get(..length).unwrap_or_default());
            }
        }
    }
}
