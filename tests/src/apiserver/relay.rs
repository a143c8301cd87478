//! A TCP relay that can be cut or stalled: the network between an agent and its API server.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};

const FORWARD: u8 = 0;
const CUT: u8 = 1;
const STALL: u8 = 2;
const END: u8 = 3;

struct Shared {
    mode: AtomicU8,
    accepted: AtomicUsize,
    streams: Mutex<Vec<TcpStream>>,
}

/// Listens on a loopback port of its own and passes on to one address, in the network namespace of the thread that started it.
pub struct Relay {
    address: SocketAddr,
    listener: TcpListener,
    shared: Arc<Shared>,
}

impl Relay {
    pub fn start(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen for the relay")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            mode: AtomicU8::new(FORWARD),
            accepted: AtomicUsize::new(0),
            streams: Mutex::new(Vec::new()),
        });
        let accepting = Arc::clone(&shared);
        let incoming = listener.try_clone().context("listen for the relay")?;
        thread::spawn(move || {
            for stream in incoming.incoming() {
                match accepting.mode.load(Ordering::SeqCst) {
                    END => return,
                    // Dropped at once: the other side sees the connection closed.
                    CUT => {}
                    _ => {
                        if let Ok(stream) = stream {
                            accepting.accepted.fetch_add(1, Ordering::SeqCst);
                            join(stream, to, &accepting);
                        }
                    }
                }
            }
        });
        Ok(Self { address, listener, shared })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections taken so far.
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    pub fn forward(&self) {
        self.shared.mode.store(FORWARD, Ordering::SeqCst);
    }

    /// Closes every connection, and every new one as it comes.
    pub fn cut(&self) {
        self.shared.mode.store(CUT, Ordering::SeqCst);
        self.shared.close();
    }

    /// Connections stay open, new ones are taken, and nothing passes any more: a peer that lost power. What stalls now stays
    /// stalled after [`Self::forward`]; only new connections pass again.
    pub fn stall(&self) {
        self.shared.mode.store(STALL, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.mode.store(END, Ordering::SeqCst);
        self.shared.close();
        // Wakes the accepting thread so that it ends, in whatever namespace it listens.
        let _woken = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}

impl Shared {
    fn close(&self) {
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _closed = stream.shutdown(Shutdown::Both);
        }
    }
}

fn join(client: TcpStream, to: SocketAddr, shared: &Arc<Shared>) {
    let Ok(server) = TcpStream::connect_timeout(&to, Duration::from_secs(5)) else { return };
    for (from, to) in [(&client, &server), (&server, &client)] {
        let (Ok(from), Ok(to), Ok(kept)) = (from.try_clone(), to.try_clone(), from.try_clone()) else { return };
        shared.streams.lock().unwrap_or_else(PoisonError::into_inner).push(kept);
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            let _ended = pass(&from, &to, &shared);
            if shared.mode.load(Ordering::SeqCst) != STALL {
                let _closed = to.shutdown(Shutdown::Both);
            }
        });
    }
}

fn pass(mut from: &TcpStream, mut to: &TcpStream, shared: &Shared) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    let mut stalled = false;
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        // Once a byte is swallowed the stream is of no use any more.
        stalled |= shared.mode.load(Ordering::SeqCst) == STALL;
        if !stalled {
            to.write_all(&buffer[..read])?;
        }
    }
}
