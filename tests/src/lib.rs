//! Worlds of network namespaces, what runs in their pods, and the cases that every dataplane has to pass.
//!
//! - [`world`] makes a cluster on one machine: nodes, pods, a client outside, the real agent on each node.
//! - [`pod`] is what runs inside: a server that says who it is, and clients that say what they saw.
//! - [`cases`] are the questions, each with the number of the contract that answers it.
//! - [`apiserver`] is a real etcd and kube-apiserver.
//! - [`golang`] builds Kubernetes' own programs.
//! - [`cluster`] is a whole cluster of them, with containers.
//! - [`conformance`] puts one table of cases to our dataplanes and to kube-proxy.
//! - [`extent`] is how much the benchmarks measure.
//! - [`feed`] is a made-up API server for more changes than a real one takes.
//! - [`manifests`] is what a cluster would be given, and [`podman`] runs it in a container.
//! - [`observed`] is what came of connections while one proxy took another's place.
//! - [`ahead`] goes first on a busy machine.
//! - [`suite`] runs cases and counts what passed, failed and was skipped.

pub mod ahead;
pub mod apiserver;
pub mod cases;
pub mod cluster;
pub mod conformance;
pub mod extent;
pub mod feed;
pub mod golang;
pub mod manifests;
pub mod observed;
pub mod pod;
pub mod podman;
pub mod signals;
pub mod suite;
pub mod world;
