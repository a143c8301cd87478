//! The eBPF programs. One file per hook family, a short body each: parse, look up, decide, rewrite, verdict.
//!
//! Nothing here knows what a Service is: the agent's `plan` compiled every policy into the verdicts and ranges of the
//! `frontends` map. A program that cannot make sense of something leaves it to the stack.
//!
//! On the host this is an empty program, so that `cargo check` and clippy read it without a BPF toolchain.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// The instruction that adds to a shared word: no stable way leads to it for this target, which has no compare-and-swap (before v3).
#![cfg_attr(target_arch = "bpf", allow(internal_features), feature(core_intrinsics))]
#![allow(unreachable_pub, reason = "entry points are reached by the loader, by section name")]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "keys and values handed to a map by value would be copied to the 512 bytes of stack first"
)]

mod apart;
mod client;
mod clock;
mod count;
mod globals;
mod log;
mod lookup;
mod maps;
mod sealed;
mod socket;
mod tc;
mod xdp;

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: never reached: the programs hold no panicking operation, or the verifier would refuse the loop below.
    unsafe { core::hint::unreachable_unchecked() }
}

/// Dual, as the kernel's helpers demand: some are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
