//! For tests of what carries out: frontends that are refused, which needs the fewest rules.

use std::sync::Arc;

use crate::{
    desired::{Action, Algorithm, Frontend, FrontendKind, FrontendSpec, Verdict, Verdicts},
    model::{Protocol, ServiceKey, ServicePortName},
};

pub(crate) fn frontend(addr: &str) -> Frontend {
    Frontend { addr: addr.parse().unwrap(), port: 80.try_into().unwrap(), protocol: Protocol::Tcp }
}

pub(crate) fn spec(frontend: &Frontend) -> Arc<FrontendSpec> {
    let reject = Verdict { action: Action::Reject, masquerade: false };
    let service = ServiceKey::new("default", &format!("s{}", frontend.addr));
    Arc::new(FrontendSpec {
        service: ServicePortName { service, port: "http".into(), protocol: frontend.protocol },
        kind: FrontendKind::ClusterIp,
        all: Vec::new().into(),
        local: Vec::new().into(),
        verdicts: Verdicts { pod: reject, node: reject, external: reject },
        algorithm: Algorithm::Random,
        affinity_secs: None,
        source_ranges: None,
        pods_per_packet: false,
        alive: None,
    })
}
