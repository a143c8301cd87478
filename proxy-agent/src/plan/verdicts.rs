//! The matrix of contract A77 as a function: what happens to a new flow, by kind of frontend and origin of the packet.

use crate::{
    desired::{Action, FrontendKind, Verdict, Verdicts},
    model::TrafficPolicy,
};

/// What the verdicts of one port depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Situation {
    pub(super) internal: TrafficPolicy,
    pub(super) external: TrafficPolicy,
    /// See [`Choice::has_any`](super::topology::Choice::has_any).
    pub(super) has_any: bool,
    pub(super) has_local: bool,
    pub(super) masquerade_all: bool,
    /// Pods of this node can be told, see [`DetectLocal`](super::DetectLocal).
    pub(super) detect_local: bool,
}

impl Situation {
    /// Nothing to serve anywhere is said to the caller at once (A81, A86); nothing *here* is silence, since a load balancer
    /// that has not noticed yet would pass a refusal on to its client (A83–A85).
    fn verdict(&self, policy: TrafficPolicy, masquerade: bool) -> Verdict {
        let action = match policy {
            _ if !self.has_any => Action::Reject,
            TrafficPolicy::Cluster => Action::PickAll,
            TrafficPolicy::Local if self.has_local => Action::PickLocal,
            TrafficPolicy::Local => Action::Drop,
        };
        let picks = matches!(action, Action::PickAll | Action::PickLocal);
        Verdict { action, masquerade: masquerade && picks }
    }
}

pub(super) fn verdicts(kind: FrontendKind, situation: &Situation) -> Verdicts {
    let Situation { internal, external, masquerade_all, detect_local, .. } = *situation;
    let verdict = |policy, masquerade| situation.verdict(policy, masquerade);
    match kind {
        // A63, A71: a pod's own address reaches the backend; whoever is no pod of this node needs the answer to come back
        // through it. Where nobody can say who that is, nobody is masqueraded (A78), or everybody (A80).
        FrontendKind::ClusterIp => Verdicts {
            pod: verdict(internal, masquerade_all),
            node: verdict(internal, masquerade_all || detect_local),
            external: verdict(internal, masquerade_all || detect_local),
        },
        FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::LoadBalancer => match external {
            // A64: always masqueraded, even from a pod.
            TrafficPolicy::Cluster => {
                let all = verdict(TrafficPolicy::Cluster, true);
                Verdicts { pod: all, node: all, external: all }
            }
            // A65–A67: the client's address is kept for what comes from outside; what starts here may use any endpoint. A pod
            // that cannot be told from the outside is outside (A68).
            TrafficPolicy::Local => Verdicts {
                pod: verdict(if detect_local { TrafficPolicy::Cluster } else { TrafficPolicy::Local }, false),
                node: verdict(TrafficPolicy::Cluster, true),
                external: verdict(TrafficPolicy::Local, false),
            },
        },
    }
}
