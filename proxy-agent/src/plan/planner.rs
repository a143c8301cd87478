//! All Services together: who owns a frontend that two claim, which guards stand, and what a change changes.
//!
//! INVARIANT: the state after any sequence of `update`s equals that of one `full` over the same snapshot.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{Defaults, DetectLocal, Here, PlannedService, plan_service, pods, precedence};
use crate::{
    desired::{Changes, DesiredState, Frontend, FrontendKind, FrontendSpec, HealthCheck, HealthChecks},
    model::{EndpointSlice, Family, Service, ServiceKey, Snapshot},
};

struct Planned {
    created: i64,
    uid: Arc<str>,
    plan: PlannedService,
}

/// One Service's claim on a frontend.
struct Claim<'a> {
    created: i64,
    uid: &'a Arc<str>,
    key: &'a ServiceKey,
    spec: &'a Arc<FrontendSpec>,
}

impl Claim<'_> {
    /// The smallest wins. The kind decides first: what the cluster handed out is not taken away by what a user writes. Among
    /// equals the older Service keeps a frontend; ties go to the smaller uid, then to the smaller key.
    fn rank(&self) -> (u8, i64, &Arc<str>, &ServiceKey) {
        (precedence(self.spec.kind), self.created, self.uid, self.key)
    }
}

/// The plan of every Service, and the state they make together.
pub struct Planner {
    defaults: Defaults,
    planned: BTreeMap<ServiceKey, Planned>,
    /// Who claims a frontend without owning it; the owner is named by the frontend itself. Most frontends are not contested.
    losers: BTreeMap<Frontend, BTreeSet<ServiceKey>>,
    /// How many Services hold each guard.
    holders: BTreeMap<IpAddr, u32>,
    state: DesiredState,
    health_checks: HealthChecks,
    /// Since they were last [taken](Self::take_health_changes).
    health_changed: BTreeSet<ServiceKey>,
    /// What of pods and namespaces cannot be done, by object.
    pod_problems: BTreeMap<String, Vec<String>>,
    problems_version: u64,
}

impl Planner {
    pub fn new(defaults: Defaults) -> Self {
        Self {
            defaults,
            planned: BTreeMap::new(),
            losers: BTreeMap::new(),
            holders: BTreeMap::new(),
            state: DesiredState::default(),
            health_checks: HealthChecks::new(),
            health_changed: BTreeSet::new(),
            pod_problems: BTreeMap::new(),
            problems_version: 0,
        }
    }

    /// What should be in force.
    pub fn state(&self) -> &DesiredState {
        &self.state
    }

    /// What load balancers are to be told.
    pub fn health_checks(&self) -> &HealthChecks {
        &self.health_checks
    }

    /// What has changed of it since this was asked last; `None` where nothing is told any more.
    pub fn take_health_changes(&mut self) -> Vec<(ServiceKey, Option<HealthCheck>)> {
        let changed = std::mem::take(&mut self.health_changed).into_iter();
        changed.map(|service| (service.clone(), self.health_checks.get(&service).cloned())).collect()
    }

    /// Forgets what was planned and plans all of `snapshot`. The outcome is that of an update over all Services; it is only
    /// put together in order, which a cluster's worth of look-ups is too many for.
    pub fn full(&mut self, snapshot: &Snapshot) -> &DesiredState {
        let problems_version = self.problems_version + 1;
        let mut health_changed = std::mem::take(&mut self.health_changed);
        health_changed.extend(std::mem::take(&mut self.health_checks).into_keys());
        *self = Self { problems_version, health_changed, ..Self::new(self.defaults.clone()) };
        self.planned =
            snapshot.services.iter().map(|(key, service)| (key.clone(), self.plan(service, snapshot, None))).collect();

        let checks = self.planned.iter().filter_map(|(key, planned)| {
            let check = planned.plan.health_check.clone()?;
            Some((key.clone(), check))
        });
        self.health_checks = checks.collect();
        self.health_changed.extend(self.health_checks.keys().cloned());

        let mut claims: Vec<(Frontend, Claim<'_>)> = Vec::with_capacity(self.planned.len());
        for (key, Planned { created, uid, plan }) in &self.planned {
            let claim = |spec| Claim { created: *created, uid, key, spec };
            claims.extend(plan.frontends.iter().map(|(frontend, spec)| (*frontend, claim(spec))));
            for addr in &plan.guards {
                *self.holders.entry(*addr).or_default() += 1;
            }
        }
        claims
            .sort_unstable_by(|(a, a_claim), (b, b_claim)| a.cmp(b).then_with(|| a_claim.rank().cmp(&b_claim.rank())));
        let mut owned: Vec<(Frontend, Arc<FrontendSpec>)> = Vec::with_capacity(claims.len());
        for (frontend, claim) in claims {
            if owned.last().is_some_and(|(last, _)| *last == frontend) {
                self.losers.entry(frontend).or_default().insert(claim.key.clone());
            } else {
                owned.push((frontend, Arc::clone(claim.spec)));
            }
        }
        let left_pods;
        (left_pods, self.pod_problems) = pods::left(snapshot);
        self.state = DesiredState {
            frontends: owned.into_iter().collect(),
            guards: self.holders.keys().copied().collect(),
            local_cidrs: self.defaults.detect_local.cidrs(&snapshot.node),
            left_pods,
        };
        &self.state
    }

    /// Plans the named Services again; costs what they and their rivals are worth, whatever else there is.
    pub fn update<'k>(&mut self, snapshot: &Snapshot, changed: impl IntoIterator<Item = &'k ServiceKey>) -> Changes {
        let mut claims: BTreeMap<Frontend, Vec<ServiceKey>> = BTreeMap::new();
        let mut changes = Changes::default();
        let local_cidrs = self.defaults.detect_local.cidrs(&snapshot.node);
        if self.state.local_cidrs != local_cidrs {
            self.state.local_cidrs.clone_from(&local_cidrs);
            changes.local_cidrs = Some(local_cidrs);
            self.problems_version += 1;
        }
        // A hundred pods or so, where there are any.
        let (left_pods, pod_problems) = pods::left(snapshot);
        if self.state.left_pods != left_pods {
            self.state.left_pods.clone_from(&left_pods);
            changes.left_pods = left_pods;
        }
        if self.pod_problems != pod_problems {
            self.pod_problems = pod_problems;
            self.problems_version += 1;
        }
        for key in changed {
            let service = snapshot.services.get(key);
            let old = self.planned.remove(key);
            if service.is_none() && old.is_none() {
                continue;
            }
            let new = service.map(|service| self.plan(service, snapshot, old.as_ref()));
            self.count_guards(old.as_ref(), new.as_ref(), &mut changes);
            self.check_health(key, new.as_ref());
            let problems = |planned: &Option<Planned>| planned.as_ref().map_or(0, |p| p.plan.problems.len());
            if problems(&old) + problems(&new) > 0 {
                self.problems_version += 1;
            }
            for frontend in contended(old.as_ref(), new.as_ref()) {
                claims.entry(frontend).or_default().push(key.clone());
            }
            if let Some(new) = new {
                self.planned.insert(key.clone(), new);
            }
        }
        for (frontend, claimants) in claims {
            self.elect(frontend, claimants, &mut changes);
        }
        changes
    }

    /// A part that came out as before keeps its old value, so that whoever holds it shares it.
    fn plan(&self, service: &Service, snapshot: &Snapshot, old: Option<&Planned>) -> Planned {
        let slices = snapshot.slices.get(&service.key).into_iter().flat_map(BTreeMap::values).map(|slice| {
            let slice: &EndpointSlice = slice;
            slice
        });
        let mut plan = plan_service(service, slices, Here::from(snapshot), &self.defaults);
        if let Some(old) = old {
            for (frontend, spec) in &mut plan.frontends {
                if let Some(before) = old.plan.frontend(frontend).filter(|before| *before == spec) {
                    *spec = Arc::clone(before);
                }
            }
        }
        Planned { created: service.created, uid: Arc::clone(&service.uid), plan }
    }

    fn check_health(&mut self, key: &ServiceKey, new: Option<&Planned>) {
        let new = new.and_then(|planned| planned.plan.health_check.as_ref());
        if self.health_checks.get(key) == new {
            return;
        }
        match new {
            Some(check) => drop(self.health_checks.insert(key.clone(), check.clone())),
            None => drop(self.health_checks.remove(key)),
        }
        self.health_changed.insert(key.clone());
    }

    fn count_guards(&mut self, old: Option<&Planned>, new: Option<&Planned>, changes: &mut Changes) {
        for &addr in new.into_iter().flat_map(|planned| &planned.plan.guards) {
            let holders = self.holders.entry(addr).or_default();
            *holders += 1;
            // Given up earlier in the same update: then it stands as it stood.
            if *holders == 1 && self.state.guards.insert(addr) && !changes.unguard.remove(&addr) {
                changes.guard.insert(addr);
                // The first of a family may be one too many for local detection.
                self.problems_version += u64::from(self.defaults.detect_local != DetectLocal::Device);
            }
        }
        for &addr in old.into_iter().flat_map(|planned| &planned.plan.guards) {
            let Some(holders) = self.holders.get_mut(&addr) else { continue };
            *holders -= 1;
            if *holders == 0 {
                self.holders.remove(&addr);
                if self.state.guards.remove(&addr) && !changes.guard.remove(&addr) {
                    changes.unguard.insert(addr);
                    self.problems_version += u64::from(self.defaults.detect_local != DetectLocal::Device);
                }
            }
        }
    }

    /// Decides anew who owns `frontend`. `claimants` are those whose claim may have come, gone or changed.
    fn elect(&mut self, frontend: Frontend, claimants: Vec<ServiceKey>, changes: &mut Changes) {
        let before = self.state.frontends.get(&frontend);
        let rivals = self.losers.remove(&frontend).unwrap_or_default();
        let contested = !rivals.is_empty();
        let keys = rivals.iter().chain(before.map(|spec| &spec.service.service)).chain(&claimants);
        let mut claims: Vec<Claim<'_>> = keys
            .filter_map(|key| {
                let (key, Planned { created, uid, plan }) = self.planned.get_key_value(key)?;
                Some(Claim { created: *created, uid, key, spec: plan.frontend(&frontend)? })
            })
            .collect();
        claims.sort_unstable_by(|a, b| a.rank().cmp(&b.rank()));
        claims.dedup_by(|a, b| a.key == b.key);

        let mut claims = claims.into_iter();
        let winner = claims.next().map(|claim| Arc::clone(claim.spec));
        let losers: BTreeSet<ServiceKey> = claims.map(|claim| claim.key.clone()).collect();
        if contested || !losers.is_empty() {
            self.problems_version += 1;
        }
        if !losers.is_empty() {
            self.losers.insert(frontend, losers);
        }
        match winner {
            Some(spec) if before != Some(&spec) => {
                self.state.frontends.insert(frontend, Arc::clone(&spec));
                changes.set.insert(frontend, spec);
            }
            Some(_) => {}
            None => {
                if self.state.frontends.remove(&frontend).is_some() {
                    changes.remove.insert(frontend);
                }
            }
        }
    }

    /// Grows whenever [`problems`](Self::problems) may say something else.
    pub fn problems_version(&self) -> u64 {
        self.problems_version
    }

    /// What was left out of each Service, and why.
    pub fn problems(&self) -> BTreeMap<String, Vec<String>> {
        let mut problems: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (key, planned) in self.planned.iter().filter(|(_, planned)| !planned.plan.problems.is_empty()) {
            problems.entry(format!("Service {key}")).or_default().extend_from_slice(&planned.plan.problems);
        }
        problems.extend(self.pod_problems.iter().map(|(object, why)| (object.clone(), why.clone())));
        problems.extend(self.undetected().map(|problem| ("local detection".to_owned(), vec![problem])));
        for (frontend, losers) in &self.losers {
            let Some(owner) = self.state.frontends.get(frontend).map(|spec| &spec.service) else { continue };
            for loser in losers {
                problems.entry(format!("Service {loser}")).or_default().push(format!(
                    "{frontend} is already used by {owner}, which {} and keeps it; give one of the two another address or port",
                    self.won_by(frontend, &owner.service, loser)
                ));
            }
        }
        problems
    }

    /// Families that are served although nobody can tell their pods (contract A73).
    fn undetected(&self) -> Option<String> {
        let (whose, remedy) = match &self.defaults.detect_local {
            DetectLocal::Device => return None,
            DetectLocal::Cidrs(_) => ("--cluster-cidr names no", "name one, or leave --detect-local-mode out"),
            DetectLocal::NodeCidrs => {
                ("the Node has no pod CIDR of", "see that it gets one, or leave --detect-local-mode out")
            }
        };
        let served = |family| self.state.guards.iter().any(|addr| Family::of(*addr) == family);
        let told = |family| self.state.local_cidrs.iter().any(|cidr| Family::of(cidr.addr()) == family);
        let blind: Vec<&str> = [(Family::V4, "IPv4"), (Family::V6, "IPv6")]
            .into_iter()
            .filter(|(family, _)| served(*family) && !told(*family))
            .map(|(_, name)| name)
            .collect();
        (!blind.is_empty()).then(|| {
            format!(
                "{whose} {} addresses, so pods of this node cannot be told: nothing to a ClusterIP is masqueraded, and with \
                 externalTrafficPolicy Local a pod counts as outside; {remedy}",
                blind.join(" and ")
            )
        })
    }

    /// What decided between two claims; see [`Claim::rank`].
    fn won_by(&self, frontend: &Frontend, owner: &ServiceKey, loser: &ServiceKey) -> &'static str {
        let kind = |key| self.planned.get(key)?.plan.frontend(frontend).map(|spec| spec.kind);
        if let (Some(ours), Some(theirs)) = (kind(owner), kind(loser))
            && ours != theirs
        {
            return match ours {
                FrontendKind::ClusterIp => "has it as its ClusterIP",
                FrontendKind::NodePort => "has it as its NodePort",
                FrontendKind::LoadBalancer => "has it from its load balancer",
                FrontendKind::ExternalIp => "has it as its external IP",
            };
        }
        let rank = |key| self.planned.get(key).map(|planned| (planned.created, &planned.uid));
        match rank(owner).zip(rank(loser)) {
            Some(((0, _), (created, _))) if created != 0 => "has no creationTimestamp, which counts as older,",
            Some(((owner, _), (loser, _))) if owner != loser => "is older",
            Some(((_, owner), (_, loser))) if owner != loser => "is as old, has the smaller uid",
            _ => "is as old, has the name that sorts first",
        }
    }
}

/// Frontends whose claim comes, goes or changes between two plans of one Service.
fn contended(old: Option<&Planned>, new: Option<&Planned>) -> Vec<Frontend> {
    let same_rank = old.zip(new).is_some_and(|(old, new)| old.created == new.created && old.uid == new.uid);
    let spec_in = |planned: Option<&Planned>, frontend: &Frontend| -> Option<Arc<FrontendSpec>> {
        planned?.plan.frontend(frontend).map(Arc::clone)
    };
    let of = |planned: Option<&'_ Planned>| -> Vec<Frontend> {
        planned
            .map(|planned| planned.plan.frontends.iter().map(|(frontend, _)| *frontend).collect())
            .unwrap_or_default()
    };
    let mut contended = of(new);
    contended.retain(|frontend| !same_rank || spec_in(old, frontend) != spec_in(new, frontend));
    contended.extend(of(old).into_iter().filter(|frontend| spec_in(new, frontend).is_none()));
    contended
}
