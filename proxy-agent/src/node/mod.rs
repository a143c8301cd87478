//! The node's own facts: its name, and its devices as they come and go.
//!
//! Level-triggered like everything else: an event only says that something changed. What is queued is taken together, links,
//! addresses and default routes are listed again, and the whole is classified anew. So a lost event (the kernel says when its
//! buffer ran over) costs another listing and nothing more. Neither does a listing that fails, or a stream that ends, cost more than
//! a pause: what was seen last stands, a problem says so, and all of it begins anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    io,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, TryStreamExt};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{InfoBridge, InfoData, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp},
    route::{RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    desired::{Device, DeviceRole, Devices},
    ipsec,
    model::{Event, NodeFacts, Teller},
};

pub mod classify;

use classify::{Address, Link, classify, own_addresses, route_devices};
pub use classify::{Detect, Pattern};

/// How long events are gathered: a pod's link makes half a dozen of them.
const GATHER: Duration = Duration::from_millis(10);
/// Between attempts to ask a kernel that does not answer; doubled from the first to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often IPsec policies are asked for where nobody tells of them.
const ASK: Duration = Duration::from_secs(1);
/// The place of problems.
const DEVICES: &str = "network devices";

#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `--devices`.
    pub patterns: Vec<Pattern>,
    pub detect: Detect,
    /// `--uplinks`.
    pub uplinks: Vec<Pattern>,
    /// XDP is asked for, so IPsec policies matter.
    pub xdp: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("cannot watch network devices: {0}")]
    Open(#[source] io::Error),
    #[error("cannot list {what}: {source}")]
    List { what: &'static str, source: rtnetlink::Error },
    #[error("the kernel's stream of device events ended")]
    Ended,
    #[error("cannot hear of IPsec policies: {0}")]
    Ipsec(#[source] io::Error),
}

/// What an event calls for.
#[derive(Default)]
struct Dirty {
    any: bool,
    routes: bool,
    /// A device of ours went away; one of the same index may have come, so the list is published even if it looks the same.
    gone: bool,
}

/// Tells the node's own addresses at once, and the devices once the node's facts are known; then both whenever they change,
/// until cancelled.
///
/// Devices not before: roles depend on the node's addresses, and a pod taken for the outside world is masqueraded.
pub async fn run(
    options: Options,
    facts: watch::Receiver<Option<Arc<NodeFacts>>>,
    events: mpsc::Sender<Event>,
    devices: watch::Sender<Devices>,
    cancel: CancellationToken,
) -> Result<(), NodeError> {
    let watcher = Watcher {
        options,
        facts,
        events,
        devices,
        pause: FIRST_PAUSE,
        routes: BTreeSet::new(),
        addresses: None,
        ipsec: None,
    };
    tokio::select! {
        () = cancel.cancelled() => Ok(()),
        error = watcher.watch() => Err(error),
    }
}

/// A connection to the kernel; closed with this value.
struct Connection {
    task: JoinHandle<()>,
    handle: Handle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Watcher {
    options: Options,
    facts: watch::Receiver<Option<Arc<NodeFacts>>>,
    events: mpsc::Sender<Event>,
    devices: watch::Sender<Devices>,
    /// How long to wait after the next failure.
    pause: Duration,
    /// Devices with a default route, as last listed.
    routes: BTreeSet<u32>,
    /// The node's own, as last told.
    addresses: Option<BTreeSet<IpAddr>>,
    /// What of IPsec keeps XDP off, as last asked for.
    ipsec: Option<&'static str>,
}

impl Watcher {
    /// Returns only if the kernel cannot be asked at all.
    async fn watch(mut self) -> NodeError {
        let mut opened = false;
        loop {
            let error = match self.follow(&mut opened).await {
                Err(error) if !opened => return error,
                Err(error) => error,
                Ok(never) => match never {},
            };
            tracing::warn!(%error, again = ?self.pause, "the node's devices and addresses are as they were seen last");
            let problem = format!("{error}; what was seen last stands, and it is tried again");
            self.tell(Event::Problems(Teller::Devices, [(DEVICES.to_owned(), vec![problem])].into())).await;
            self.rest().await;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The pause after a failure. What was seen last stands, but for this: XDP would send past a policy that nobody told of.
    async fn rest(&mut self) {
        let end = tokio::time::Instant::now() + self.pause;
        while tokio::time::Instant::now() < end {
            if self.options.xdp && self.ipsec.is_none() {
                self.ipsec = ipsec::bars();
                self.devices.send_if_modified(|devices| {
                    keep_xdp_off(devices, self.ipsec);
                    self.ipsec.is_some() && !devices.is_empty()
                });
            }
            tokio::time::sleep_until(end.min(tokio::time::Instant::now() + ASK)).await;
        }
    }

    /// Whatever was listed is whole and told.
    async fn all_is_well(&mut self) {
        if std::mem::replace(&mut self.pause, FIRST_PAUSE) != FIRST_PAUSE {
            self.tell(Event::Problems(Teller::Devices, BTreeMap::new())).await;
        }
    }

    async fn tell(&self, event: Event) {
        // Nobody listens any more: then the agent is ending.
        let _ = self.events.send(event).await;
    }

    fn known(&mut self) -> Arc<NodeFacts> {
        self.facts.borrow_and_update().clone().unwrap_or_default()
    }

    /// Lists all there is, and what changes, over a connection of its own.
    async fn follow(&mut self, opened: &mut bool) -> Result<Infallible, NodeError> {
        let (connection, handle, mut heard) = new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])
        .map_err(NodeError::Open)?;
        *opened = true;
        let ipsec = ipsec::Ear::open(self.options.xdp).map_err(NodeError::Ipsec)?;
        let connection = Connection { task: tokio::spawn(connection), handle };
        let handle = &connection.handle;
        self.tell_addresses(handle).await?;
        // If nobody is left who could tell, what the devices themselves say has to do.
        let _ = self.facts.wait_for(Option::is_some).await;
        let known = self.known();
        let mut published = self.list(handle, &known, true).await?;
        // Even if it is what was told before: of what happened meanwhile nothing was heard.
        self.devices.send_replace(published.clone());
        self.all_is_well().await;
        loop {
            let mut dirty = Dirty::default();
            tokio::select! {
                first = heard.next() => {
                    let (first, _) = first.ok_or(NodeError::Ended)?;
                    self.note(first.payload, &published, &mut dirty);
                }
                // Nobody will tell any more: what is known stays.
                Ok(()) = self.facts.changed() => dirty.any = true,
                heard = ipsec.heard() => {
                    heard.map_err(NodeError::Ipsec)?;
                    dirty.any = ipsec::bars() != self.ipsec;
                }
            }
            if !dirty.any {
                continue;
            }
            let gathered = tokio::time::sleep(GATHER);
            tokio::pin!(gathered);
            loop {
                tokio::select! {
                    () = &mut gathered => break,
                    event = heard.next() => {
                        let (event, _) = event.ok_or(NodeError::Ended)?;
                        self.note(event.payload, &published, &mut dirty);
                    }
                }
            }
            let known = self.known();
            let addresses = self.addresses.clone();
            let now = self.list(handle, &known, dirty.routes).await?;
            // Flows may be masqueraded with any of the node's addresses, whichever device it is of.
            if now != published || dirty.gone || self.addresses != addresses {
                tracing::info!(devices = now.len(), "devices changed");
                self.devices.send_replace(now.clone());
                published = now;
            }
        }
    }

    fn note(
        &self,
        payload: rtnetlink::packet_core::NetlinkPayload<RouteNetlinkMessage>,
        published: &Devices,
        dirty: &mut Dirty,
    ) {
        use rtnetlink::packet_core::NetlinkPayload;
        match payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                dirty.any = true;
                dirty.routes |= self.routes.contains(&link.header.index);
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => {
                dirty.any = true;
                dirty.gone |= published.contains_key(&link.header.index);
                dirty.routes |= self.routes.contains(&link.header.index);
            }
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address),
            ) => {
                dirty.any = true;
                dirty.routes |= self.routes.contains(&address.header.index);
            }
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
            ) => {
                let default = is_default(&route);
                dirty.any |= default;
                dirty.routes |= default;
            }
            // Events were lost.
            NetlinkPayload::Overrun(_) => *dirty = Dirty { any: true, routes: true, gone: true },
            _ => {}
        }
    }

    /// Lists links with their addresses, and tells the addresses if they are other ones than before.
    async fn tell_addresses(&mut self, handle: &Handle) -> Result<BTreeMap<u32, Link>, NodeError> {
        let links = list_links(handle).await?;
        let own = own_addresses(&links);
        if self.addresses.as_ref() != Some(&own) {
            tracing::info!(addresses = own.len(), "the node's addresses");
            self.tell(Event::Addresses(own.clone())).await;
            self.addresses = Some(own);
        }
        Ok(links)
    }

    async fn list(&mut self, handle: &Handle, facts: &NodeFacts, routes: bool) -> Result<Devices, NodeError> {
        let mut links = self.tell_addresses(handle).await?;
        if routes {
            self.routes = list_routes(handle).await?;
        }
        for index in &self.routes {
            if let Some(link) = links.get_mut(index) {
                link.default_route = true;
            }
        }
        self.routes = route_devices(&links);
        let mut devices = classify(&links, facts, &self.options);
        if self.options.xdp {
            self.ipsec = ipsec::bars();
            keep_xdp_off(&mut devices, self.ipsec);
        }
        Ok(devices)
    }
}

fn keep_xdp_off(devices: &mut Devices, why: Option<&'static str>) {
    for device in devices.values_mut() {
        device.without_xdp = device.without_xdp.or(why);
    }
}

/// What `check` has to say of devices.
pub struct Survey {
    /// Bridges that lead out of the node, none of whose ports does so visibly, with their ports.
    pub without_uplink: BTreeMap<String, Vec<String>>,
    /// Devices that lead out of the node, each with the program on its XDP hook.
    pub outward: BTreeMap<u32, (Device, Option<u32>)>,
}

pub async fn survey(options: &Options) -> Result<Survey, NodeError> {
    let (connection, handle, _) = new_connection().map_err(NodeError::Open)?;
    let connection = Connection { task: tokio::spawn(connection), handle };
    let mut links = list_links(&connection.handle).await?;
    for index in list_routes(&connection.handle).await? {
        if let Some(link) = links.get_mut(&index) {
            link.default_route = true;
        }
    }
    let mut devices = classify(&links, &NodeFacts::default(), options);
    keep_xdp_off(&mut devices, ipsec::bars());
    let outward = devices.into_iter().filter(|(_, device)| device.role == DeviceRole::Outward);
    let program = |index| links.get(&index).and_then(|link| link.xdp_program);
    Ok(Survey {
        without_uplink: classify::without_uplink(&links, options),
        outward: outward.map(|(index, device)| (index, (device, program(index)))).collect(),
    })
}

/// Links with their addresses.
async fn list_links(handle: &Handle) -> Result<BTreeMap<u32, Link>, NodeError> {
    let mut links = BTreeMap::new();
    let mut listed = handle.link().get().execute();
    while let Some(message) = listed.try_next().await.map_err(failed("network devices"))? {
        links.insert(message.header.index, link_of(message));
    }
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses.try_next().await.map_err(failed("addresses"))? {
        if let Some(link) = links.get_mut(&message.header.index) {
            link.addresses.extend(address_of(&message));
        }
    }
    Ok(links)
}

async fn list_routes(handle: &Handle) -> Result<BTreeSet<u32>, NodeError> {
    let mut found = BTreeSet::new();
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    for family in [v4, v6] {
        let mut listed = handle.route().get(family).execute();
        while let Some(route) = listed.try_next().await.map_err(failed("routes"))? {
            if is_default(&route) {
                found.extend(outputs(&route));
            }
        }
    }
    Ok(found)
}

fn failed(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> NodeError {
    move |source| NodeError::List { what, source }
}

fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast
}

/// Devices a route leads to.
fn outputs(route: &RouteMessage) -> impl Iterator<Item = u32> {
    route.attributes.iter().flat_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => vec![],
    })
}

fn link_of(message: LinkMessage) -> Link {
    let LinkMessage { header, attributes, .. } = message;
    let mut link = Link {
        up: header.flags.contains(LinkFlags::Up),
        loopback: header.flags.contains(LinkFlags::Loopback),
        ethernet: header.link_layer_type == LinkLayerType::Ether,
        ..Default::default()
    };
    for attribute in attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok(),
            LinkAttribute::Link(index) => link.lower = Some(index),
            LinkAttribute::Controller(index) => link.master = Some(index).filter(|index| *index != 0),
            LinkAttribute::Xdp(infos) => {
                link.xdp_program = infos.into_iter().find_map(|info| match info {
                    LinkXdp::ProgId(id) => Some(id).filter(|id| *id != 0),
                    _ => None,
                });
            }
            LinkAttribute::LinkNetNsId(id) => {
                link.peer_elsewhere = true;
                // Negative: the kernel has no number for it.
                link.peer_netns = u32::try_from(id).ok();
            }
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(InfoKind::Other(name)) => link.kind = name,
                        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
                        LinkInfo::Data(InfoData::Bridge(data)) => {
                            link.vlan_filtering = data.contains(&InfoBridge::VlanFiltering(true));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link
}

fn address_of(message: &AddressMessage) -> Option<Address> {
    let AddressMessage { header, attributes, .. } = message;
    // On a point-to-point link `Address` is the other end; `Local` is ours. IPv6 gives only `Address` otherwise.
    let local = attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let ip = local.or_else(|| {
        attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })?;
    let unassigned = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
    let unusable = unassigned | AddressHeaderFlags::Deprecated;
    let family_matches = matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6);
    Some(Address {
        ip,
        prefix: header.prefix_len,
        usable: family_matches && header.scope == AddressScope::Universe && !header.flags.intersects(unusable),
        assigned: family_matches && !header.flags.intersects(unassigned),
        secondary: header.flags.contains(AddressHeaderFlags::Secondary),
    })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
