//! How a hook shows an address, and how it takes one back.

use aya_ebpf::programs::SockAddrContext;
use proxy_common::{Be16, Ipv4Be, Ipv6Be, slot::Target};

use crate::maps::Family;

/// The address in a hook's context, as one of family `Addr`.
pub(super) trait View {
    type Addr: Family;

    fn ctx(&self) -> &SockAddrContext;
    fn addr(&self) -> Self::Addr;
    fn set_addr(&self, addr: Self::Addr);
    /// The address the socket itself is connected to; leftovers if it is not connected.
    fn connected_addr(&self) -> Self::Addr;

    #[inline(always)]
    fn target(&self) -> Target<Self::Addr> {
        // SAFETY: the context; the kernel puts the port, in network order, into the low 16 bits.
        let port = unsafe { (&raw const (*self.ctx().sock_addr).user_port).read_volatile() };
        Target { addr: self.addr(), port: Be16(port as u16) }
    }

    #[inline(always)]
    fn set_target(&self, target: Target<Self::Addr>) {
        self.set_addr(target.addr);
        // SAFETY: the context; writes of the port must be 4 bytes wide.
        unsafe { (&raw mut (*self.ctx().sock_addr).user_port).write_volatile(u32::from(target.port.0)) };
    }

    #[inline(always)]
    fn protocol(&self) -> u32 {
        // SAFETY: the context.
        unsafe { (&raw const (*self.ctx().sock_addr).protocol).read_volatile() }
    }

    /// Whether the socket is connected to `target` now.
    #[inline(always)]
    fn is_connected_to(&self, target: Target<Self::Addr>) -> bool {
        const TCP_ESTABLISHED: u32 = 1;
        // SAFETY: the context; `sk` is a full socket in these hooks. Kernel 5.3 (fb85c4a730af).
        let sk = unsafe { (&raw const (*self.ctx().sock_addr).__bindgen_anon_1.sk).read_volatile() };
        // SAFETY: a valid socket, see above; the verifier turns the loads into those of `struct sock`.
        let (state, port) =
            unsafe { ((&raw const (*sk).state).read_volatile(), (&raw const (*sk).dst_port).read_volatile()) };
        state == TCP_ESTABLISHED && port == target.port.0 && self.connected_addr() == target.addr
    }
}

/// `user_ip4` of a hook for IPv4.
pub(super) struct V4(pub(super) SockAddrContext);
/// `user_ip6` of a hook for IPv6.
pub(super) struct V6(pub(super) SockAddrContext);
/// The IPv4 address inside the IPv4-mapped `user_ip6` of a hook for IPv6.
pub(super) struct Mapped(SockAddrContext);

/// What a hook for IPv6 was called for.
pub(super) enum Either {
    Native(V6),
    Mapped(Mapped),
}

impl Either {
    #[inline(always)]
    pub(super) fn of(ctx: SockAddrContext) -> Self {
        let native = V6(ctx);
        if native.addr().v4_mapped().is_some() { Self::Mapped(Mapped(native.0)) } else { Self::Native(native) }
    }
}

/// `$ctx.$field` of the socket's own destination.
macro_rules! socket_field {
    ($view:expr, $($field:tt)+) => {{
        // SAFETY: the context; see `is_connected_to`.
        let sk = unsafe { (&raw const (*$view.ctx().sock_addr).__bindgen_anon_1.sk).read_volatile() };
        // SAFETY: a valid socket.
        unsafe { (&raw const (*sk).$($field)+).read_volatile() }
    }};
}

macro_rules! word {
    ($view:expr, $index:literal) => {
        // SAFETY: the context; the index is within the four words.
        unsafe { (&raw const (*$view.ctx().sock_addr).user_ip6[$index]).read_volatile() }
    };
    ($view:expr, $index:literal, $value:expr) => {
        // SAFETY: the context; the index is within the four words, writes are 4 bytes wide.
        unsafe { (&raw mut (*$view.ctx().sock_addr).user_ip6[$index]).write_volatile($value) }
    };
}

/// What both kinds of IPv4 address have in common: an IPv6 socket connected to a mapped one keeps the IPv4 one beside it.
macro_rules! of_ipv4 {
    () => {
        type Addr = Ipv4Be;

        #[inline(always)]
        fn ctx(&self) -> &SockAddrContext {
            &self.0
        }

        #[inline(always)]
        fn connected_addr(&self) -> Ipv4Be {
            Ipv4Be(socket_field!(self, dst_ip4))
        }
    };
}

impl View for V4 {
    of_ipv4!();

    #[inline(always)]
    fn addr(&self) -> Ipv4Be {
        // SAFETY: the context.
        Ipv4Be(unsafe { (&raw const (*self.0.sock_addr).user_ip4).read_volatile() })
    }

    #[inline(always)]
    fn set_addr(&self, addr: Ipv4Be) {
        // SAFETY: the context.
        unsafe { (&raw mut (*self.0.sock_addr).user_ip4).write_volatile(addr.0) };
    }
}

impl View for Mapped {
    of_ipv4!();

    #[inline(always)]
    fn addr(&self) -> Ipv4Be {
        Ipv4Be(word!(self, 3))
    }

    #[inline(always)]
    fn set_addr(&self, addr: Ipv4Be) {
        word!(self, 3, addr.0);
    }
}

impl View for V6 {
    type Addr = Ipv6Be;

    #[inline(always)]
    fn ctx(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    fn addr(&self) -> Ipv6Be {
        Ipv6Be([word!(self, 0), word!(self, 1), word!(self, 2), word!(self, 3)])
    }

    #[inline(always)]
    fn set_addr(&self, addr: Ipv6Be) {
        let Ipv6Be([a, b, c, d]) = addr;
        word!(self, 0, a);
        word!(self, 1, b);
        word!(self, 2, c);
        word!(self, 3, d);
    }

    #[inline(always)]
    fn connected_addr(&self) -> Ipv6Be {
        Ipv6Be([
            socket_field!(self, dst_ip6[0]),
            socket_field!(self, dst_ip6[1]),
            socket_field!(self, dst_ip6[2]),
            socket_field!(self, dst_ip6[3]),
        ])
    }
}
