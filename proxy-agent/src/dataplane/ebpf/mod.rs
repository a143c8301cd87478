//! The eBPF dataplane.
pub(crate) mod alloc;
pub(crate) mod family;
pub(crate) mod layout;
pub mod object;
pub(crate) mod render;
pub(crate) mod services;
pub(crate) mod store;
pub(crate) mod sys;
pub(crate) mod table;
