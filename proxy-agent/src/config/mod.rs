//! The configuration: its values and how they are written, the two documents of its file, and what each of their fields means here.
//!
//! ```text
//! values      modes, durations, ranges of ports, addresses to listen on
//! field       a field: its place, its option, its kind, its default, whether anything here goes by it
//! kube_proxy  the fields of a KubeProxyConfiguration, and the options of kube-proxy's that no field has
//! own         the fields of a ProxyAgentConfiguration
//! tree        YAML with the lines it stands at, read and written
//! file        text in, what it says out; all that is wrong with it, each by line and field; and the other way round
//! gates       kube-proxy's feature gates
//! ```
//!
//! Nothing here reads a command line or a file (`cli` does) or acts on a value (everything else does).

pub mod field;
pub mod file;
pub mod gates;
pub mod kube_proxy;
pub mod own;
pub mod tree;
mod values;

pub use field::{Document, Field, Here, Kind};
pub use file::{Said, Wrong};
pub use values::*;
