//! Read-only globals, set at load time; see `proxy_common::globals` for their meaning.
//!
//! Each is read volatile: the compiler must not fold the default in. The verifier sees frozen read-only data and prunes the
//! branches they switch off.

use core::ptr::read_volatile;

macro_rules! globals {
    ($($static:ident, $getter:ident: $t:ty = $default:expr;)+) => {$(
        #[unsafe(no_mangle)]
        static $static: $t = $default;

        #[inline(always)]
        pub(crate) fn $getter() -> $t {
            // SAFETY: a valid, aligned, initialised static.
            unsafe { read_volatile(&raw const $static) }
        }
    )+};
}

globals! {
    SOCKET_LB, socket_lb: u8 = 0;
    NODE_NETNS_COOKIE, node_netns_cookie: u64 = 0;
    MASQUERADE_PORT_MIN, masquerade_port_min: u16 = 1024;
    MASQUERADE_PORT_MAX, masquerade_port_max: u16 = 29_999;
    REFUSALS_PER_SECOND, refusals_per_second: u32 = 1000;
    TCP_ESTABLISHED_SECS, tcp_established_secs: u32 = 86_400;
    TCP_CLOSE_WAIT_SECS, tcp_close_wait_secs: u32 = 3_600;
    UDP_SECS, udp_secs: u32 = 30;
    UDP_STREAM_SECS, udp_stream_secs: u32 = 120;
    CONNECTED_UDP, connected_udp: u8 = 1;
    DETECT_LOCAL, detect_local: u8 = 0;
    LEFT_PODS, left_pods: u8 = 0;
    HAVE_SET_RETVAL, have_set_retval: u8 = 1;
    HAVE_COARSE_CLOCK, have_coarse_clock: u8 = 1;
}
