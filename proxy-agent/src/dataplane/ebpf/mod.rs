//! The eBPF dataplane.
pub(crate) mod alloc;
pub mod object;
pub(crate) mod sys;
