//! What the programs are told when they are loaded.

use std::io;

use aya::{
    EbpfLoader,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use proxy_common::globals;

use crate::{
    dataplane::{
        DataplaneError, DetectLocal,
        ebpf::{Options, SocketLb, Tc, Timeouts, hygiene, kernel, layout::MapName, object::Digest, unavailable},
    },
    model::Protocol,
};

/// What programs are loaded with; together with the object, what tells one set of programs from another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Globals {
    socket_lb: u8,
    pub(super) node_netns_cookie: u64,
    masquerade_ports: (u16, u16),
    timeouts: Timeouts,
    connected_udp: u8,
    detect_local: u8,
    left_pods: u8,
    have_set_retval: u8,
    have_coarse_clock: u8,
    pub(super) log_level: u8,
    /// Not a global: another way to attach is another set of hooks.
    tc: Tc,
}

impl Globals {
    pub(crate) fn of(options: &Options) -> Result<Self, DataplaneError> {
        let helper = |program, helper: BpfHelper| {
            is_helper_supported(program, helper).map(u8::from).map_err(|error| {
                unavailable(format!(
                    "cannot ask the kernel which helpers it has ({error}): the agent needs CAP_BPF and CAP_PERFMON \
                     (CAP_SYS_ADMIN before kernel 5.8)"
                ))
            })
        };
        Ok(Self {
            socket_lb: match options.socket_lb {
                SocketLb::Node => globals::socket_lb::NODE,
                SocketLb::All | SocketLb::Off => globals::socket_lb::ALL,
            },
            node_netns_cookie: netns_cookie().map_err(kernel("SO_NETNS_COOKIE (kernel 5.14)"))?,
            masquerade_ports: options.masquerade_ports,
            timeouts: options.timeouts,
            detect_local: match options.detect_local {
                DetectLocal::Device => globals::detect_local::DEVICE,
                DetectLocal::Address => globals::detect_local::ADDRESS,
            },
            left_pods: u8::from(options.left_pods),
            connected_udp: u8::from(hygiene::reaches_sockets(Protocol::Udp).is_ok()),
            have_set_retval: helper(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)?,
            have_coarse_clock: helper(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_ktime_get_coarse_ns)?,
            log_level: options.log_level,
            tc: options.tc,
        })
    }

    /// Sets them in what is about to be loaded.
    pub(crate) fn give<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        let Self {
            socket_lb,
            node_netns_cookie,
            masquerade_ports: (low, high),
            timeouts: Timeouts { tcp_established, tcp_close_wait, udp, udp_stream },
            connected_udp,
            detect_local,
            left_pods,
            have_set_retval,
            have_coarse_clock,
            log_level,
            tc: _,
        } = self;
        loader
            .override_global(globals::SOCKET_LB, socket_lb, true)
            .override_global(globals::NODE_NETNS_COOKIE, node_netns_cookie, true)
            .override_global(globals::MASQUERADE_PORT_MIN, low, true)
            .override_global(globals::MASQUERADE_PORT_MAX, high, true)
            .override_global(globals::TCP_ESTABLISHED_SECS, tcp_established, true)
            .override_global(globals::TCP_CLOSE_WAIT_SECS, tcp_close_wait, true)
            .override_global(globals::UDP_SECS, udp, true)
            .override_global(globals::UDP_STREAM_SECS, udp_stream, true)
            .override_global(globals::CONNECTED_UDP, connected_udp, true)
            .override_global(globals::DETECT_LOCAL, detect_local, true)
            .override_global(globals::LEFT_PODS, left_pods, true)
            .override_global(globals::HAVE_SET_RETVAL, have_set_retval, true)
            .override_global(globals::HAVE_COARSE_CLOCK, have_coarse_clock, true)
            .override_global(globals::LOG_LEVEL, log_level, true);
    }

    pub(super) fn digest(&self, object: &[u8], programs: &[&str], maps: &[(MapName, u32)]) -> u64 {
        let Self {
            socket_lb,
            node_netns_cookie,
            masquerade_ports,
            timeouts: Timeouts { tcp_established, tcp_close_wait, udp, udp_stream },
            connected_udp,
            detect_local,
            left_pods,
            have_set_retval,
            have_coarse_clock,
            log_level,
            tc,
        } = self;
        let mut digest = Digest::new()
            .bytes(object)
            .bytes(&[*socket_lb, *connected_udp, *detect_local, *left_pods])
            .bytes(&[*have_set_retval, *have_coarse_clock, *log_level, *tc as u8])
            .bytes(&node_netns_cookie.to_le_bytes())
            .bytes(&masquerade_ports.0.to_le_bytes())
            .bytes(&masquerade_ports.1.to_le_bytes());
        for seconds in [tcp_established, tcp_close_wait, udp, udp_stream] {
            digest = digest.bytes(&seconds.to_le_bytes());
        }
        for program in programs {
            digest = digest.bytes(program.as_bytes());
        }
        // Programs hold on to their maps: other maps need other programs.
        for (map, entries) in maps {
            digest = digest.bytes(map.as_str().as_bytes()).bytes(&entries.to_le_bytes());
        }
        digest.finish()
    }
}

/// `SO_NETNS_COOKIE` of the namespace this process is in (kernel 5.14, e8b9eab99232).
pub(crate) fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the socket is open, and `cookie` has room for the `len` bytes the kernel may write.
    let result = unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
