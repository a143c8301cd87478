//! Planning one Service, by subject; what all of that needs is here.

use std::{collections::BTreeSet, net::IpAddr};

use super::{topology::choose, *};
use crate::{
    desired::{FamilyCheck, Verdict, Verdicts},
    model::{Endpoint, Protocol},
};

/// What the tests outside of the library build their worlds from.
#[path = "../../tests/common/mod.rs"]
mod common;

use common::port;

mod choice;
mod detection;
mod endpoints;
mod frontends;
mod health;
mod matrix;

fn service(ips: &[&str]) -> Service {
    common::service("web", ips)
}

/// `ADDRESS FLAGS…`: `local`, `notready`, `terminating` (serving, not ready), `dead` (terminating, not serving),
/// `z:a,b` zone hints, `n:a,b` node hints.
fn endpoint(text: &str) -> Endpoint {
    let mut words = text.split_whitespace();
    let address: IpAddr = words.next().unwrap().parse().unwrap();
    let mut endpoint = common::endpoint(address);
    for word in words {
        match word {
            "local" => endpoint.node = Some("this".into()),
            "notready" => (endpoint.ready, endpoint.serving) = (false, false),
            "terminating" => (endpoint.ready, endpoint.terminating) = (false, true),
            "dead" => (endpoint.ready, endpoint.serving, endpoint.terminating) = (false, false, true),
            "ready-terminating" => endpoint.terminating = true,
            _ if word.starts_with("z:") => {
                endpoint.hints.get_or_insert_default().zones = word[2..].split(',').map(Into::into).collect()
            }
            _ if word.starts_with("n:") => {
                endpoint.hints.get_or_insert_default().nodes = word[2..].split(',').map(Into::into).collect()
            }
            _ => panic!("unknown flag {word}"),
        }
    }
    endpoint
}

fn slice(name: &str, endpoints: &[&str]) -> EndpointSlice {
    let endpoints = endpoints.iter().map(|text| endpoint(text)).collect();
    EndpointSlice { endpoints, ..common::slice("web", name, &[]) }
}

fn node(zone: &str) -> NodeFacts {
    common::node("this", (zone != "-").then_some(zone))
}

fn plan(service: &Service, slices: &[EndpointSlice]) -> PlannedService {
    plan_with(service, slices, &Defaults::default())
}

/// What the node of these tests has.
const OWN: &str = "10.244.1.1 127.0.0.1 192.0.2.1 192.0.2.99 ::1 2001:db8::1 fe80::1";

fn plan_with(service: &Service, slices: &[EndpointSlice], defaults: &Defaults) -> PlannedService {
    let own = OWN.split(' ').map(|ip| ip.parse().unwrap()).collect();
    let node = NodeFacts { internal_ips: vec!["192.0.2.1".parse().unwrap()], ..node("-") };
    plan_service(service, slices.iter(), Here { node: &node, addresses: &own }, defaults)
}

fn addresses(set: &[Backend]) -> String {
    set.iter().map(|backend| backend.addr.to_string()).collect::<Vec<_>>().join(" ")
}

fn only(planned: &PlannedService) -> &FrontendSpec {
    assert_eq!(planned.frontends.len(), 1, "{planned:?}");
    &planned.frontends[0].1
}

const TWO_LOCAL: &[&str] = &["10.0.0.1 local", "10.0.0.2 local"];
const ONE_LOCAL: &[&str] = &["10.0.0.1 local", "10.0.0.2"];
const NONE_LOCAL: &[&str] = &["10.0.0.1", "10.0.0.2"];
const ALL: Option<&str> = Some("10.0.0.1 10.0.0.2");

/// `A`: pick all, `L`: pick local, `D`: drop, `R`: reject; `m`: masquerade. Pod, node, external.
fn row(verdicts: Verdicts) -> String {
    let cell = |Verdict { action, masquerade }| {
        let action = match action {
            Action::PickAll => "A",
            Action::PickLocal => "L",
            Action::Drop => "D",
            Action::Reject => "R",
            Action::Pass => "P",
        };
        format!("{action}{}", if masquerade { "m" } else { "" })
    };
    [verdicts.pod, verdicts.node, verdicts.external].map(cell).join(" ")
}

/// The spec of `ADDRESS:PORT/PROTOCOL`.
fn at<'a>(planned: &'a PlannedService, frontend: &str) -> &'a FrontendSpec {
    let found = planned.frontends.iter().find(|(known, _)| known.to_string() == frontend);
    &found.unwrap_or_else(|| panic!("no {frontend} in {:?}", claimed(planned))).1
}

/// `FRONTEND KIND` of all.
fn claimed(planned: &PlannedService) -> Vec<String> {
    planned.frontends.iter().map(|(frontend, spec)| format!("{frontend} {}", spec.kind)).collect()
}

/// One Service of every kind of address, as the matrix has it.
fn everything() -> Service {
    let mut service = service(&["10.96.0.1"]);
    service.ports[0].node_port = Some(port(30080));
    service.external_ips = vec!["198.51.100.1".parse().unwrap()];
    service.load_balancer_ips = vec!["203.0.113.1".parse().unwrap()];
    service
}
