//! One table of cases for every dataplane that claims to do what a Service means: ours, and kube-proxy's own.
//!
//! - [`services`] are the Services, one line each; [`table`] are the questions and their answers, one line each.
//! - [`changes`] are cases in which something changes between two questions.
//! - [`random`] makes Services up; what kube-proxy and we answer about them is compared.
//! - [`lab`] is the cluster: nodes and pods, a real API server (or files: [`objects`]), and the [`subject`] whose turn it is.
//! - [`judge`] knows what may differ: `docs/conformance.md` lists it, with the reason.
//!
//! kube-proxy passing a case is what proves the case.

pub mod changes;
pub mod judge;
pub mod lab;
pub mod objects;
pub mod random;
pub mod services;
pub mod subject;
pub mod table;
