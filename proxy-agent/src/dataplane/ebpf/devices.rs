//! The maps `devices` and `bridges`: what the programs must know of each device they run on. Nothing is remembered here: the maps
//! themselves say what is there.
//!
//! Entries come before a device's programs are attached, and go once they are gone.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proxy_common::{
    Ipv4Be, Ipv6Be,
    device::{DeviceValue, XdpDevice, flags, role},
};

use super::store::{Store, StoreError};
use crate::{
    dataplane::{Failure, Report},
    desired::{Device, DeviceRole, Devices},
};

/// Brings the entries that programs need before they are attached; those of other devices stay until [`prune`].
///
/// Where a bridge takes over from its ports, or they from it, both have programs for a moment, and what one has translated must not be
/// taken for a direct connection's by the other: so for that moment the bridge is behind its ports. True if that is to be taken
/// back, by putting them once more when programs have moved.
pub(crate) fn put<S: Store>(store: &mut S, devices: &Devices, report: &mut Report) -> bool {
    let before = store.writes();
    let mut moves = false;
    let failed = |report: &mut Report, device: &Device, error: &StoreError| {
        let why = format!("device {}: {error}", device.name);
        report.failed_devices.insert(device.name.clone(), Failure::Retry(why));
    };
    match store.devices().and_then(|present| Ok((present, store.bridges()?))) {
        Ok((present, bridges)) => {
            let (present, bridges): (HashMap<_, _>, HashMap<_, _>) =
                (present.into_iter().collect(), bridges.into_iter().collect());
            let leaves = |index: &u32| present.contains_key(index) && !devices.contains_key(index);
            let gives_way = |index: &u32| {
                leaves(index)
                    && devices.iter().any(|(port, device)| device.bridge == Some(*index) && !present.contains_key(port))
            };
            for (index, value) in &present {
                if value.flags & flags::BEHIND == 0 && gives_way(index) {
                    let behind = DeviceValue { flags: value.flags | flags::BEHIND, ..*value };
                    if let Err(error) = store.put_device(*index, &behind) {
                        tracing::warn!(index, %error, "a bridge that gives way to its ports is not marked so");
                    }
                }
            }
            for (index, device) in devices {
                let mut value = device_value(device);
                // Whether it has an entry does not matter: an attempt that failed since may have made it.
                let takes_over = bridges.iter().any(|(port, bridge)| bridge == index && leaves(port));
                if takes_over && value.flags & flags::BEHIND == 0 {
                    value.flags |= flags::BEHIND;
                    moves = true;
                }
                let mut put = || -> Result<(), StoreError> {
                    match (device.bridge, bridges.get(index)) {
                        (Some(bridge), has) if has != Some(&bridge) => store.put_bridge(*index, bridge)?,
                        (None, Some(_)) => store.remove_bridge(*index)?,
                        _ => {}
                    }
                    if present.get(index) != Some(&value) {
                        store.put_device(*index, &value)?;
                    }
                    Ok(())
                };
                if let Err(error) = put() {
                    failed(report, device, &error);
                }
            }
        }
        Err(error) => devices.values().for_each(|device| failed(report, device, &error)),
    }
    report.writes += store.writes() - before;
    moves
}

/// Takes the entries of the XDP program of all but these devices: from then on it leaves what comes in there to the stack, wherever its links
/// are.
pub(crate) fn keep_xdp<S: Store>(
    store: &mut S,
    devices: &BTreeSet<u32>,
    report: &mut Report,
) -> Result<(), StoreError> {
    let before = store.writes();
    for (index, _) in store.xdp_devices()? {
        if !devices.contains(&index) {
            store.remove_xdp_device(index)?;
        }
    }
    report.writes += store.writes() - before;
    Ok(())
}

/// Brings the entries of the XDP program, once others are taken, to exactly `devices`.
pub(crate) fn put_xdp<S: Store>(store: &mut S, devices: &BTreeMap<u32, XdpDevice>, report: &mut Report) {
    let before = store.writes();
    let mut put = || -> Result<(), StoreError> {
        keep_xdp(store, &devices.keys().copied().collect(), &mut Report::default())?;
        let present: BTreeMap<_, _> = store.xdp_devices()?.into_iter().collect();
        for (index, value) in devices.iter().filter(|(index, value)| present.get(index) != Some(value)) {
            store.put_xdp_device(*index, value)?;
        }
        Ok(())
    };
    if let Err(error) = put() {
        // What has no entry goes on to tc.
        tracing::warn!(%error, "XDP does less than it could");
    }
    report.writes += store.writes() - before;
}

/// Removes the entries of devices that are not in `devices`, but for those that still have a filter: a filter is found by its
/// device's entry alone.
pub(crate) fn prune<S: Store>(
    store: &mut S,
    devices: &Devices,
    filtered: &BTreeSet<u32>,
    report: &mut Report,
) -> Result<(), StoreError> {
    let before = store.writes();
    for (index, _) in store.devices()? {
        if !devices.contains_key(&index) && !filtered.contains(&index) {
            store.remove_device(index)?;
        }
    }
    for (port, _) in store.bridges()? {
        if !devices.contains_key(&port) {
            store.remove_bridge(port)?;
        }
    }
    report.writes += store.writes() - before;
    Ok(())
}

fn device_value(device: &Device) -> DeviceValue {
    let Device {
        name: _,
        role,
        ethernet: _,
        source4,
        source6,
        netns,
        bridge: _,
        behind,
        mac: _,
        veth: _,
        without_xdp: _,
        local,
    } = device;
    let otherwise = *local != (*role == DeviceRole::Pod);
    DeviceValue {
        source6: source6.map(|a| Ipv6Be::from_octets(a.octets())).unwrap_or_default(),
        source4: source4.map(|a| Ipv4Be::from_octets(a.octets())).unwrap_or_default(),
        role: match role {
            DeviceRole::Pod => role::POD,
            DeviceRole::Outward => role::OUTWARD,
            DeviceRole::Overlay => role::OVERLAY,
        },
        flags: if *behind { flags::BEHIND } else { 0 } | if otherwise { flags::OTHERWISE } else { 0 },
        netns: netns.and_then(|id| u16::try_from(id.checked_add(1)?).ok()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::ebpf::store::memory::Memory;

    #[test]
    fn a_bridge_and_its_ports_take_turns() {
        let device = |name: &str, bridge: Option<u32>| Device {
            name: name.into(),
            role: DeviceRole::Outward,
            ethernet: true,
            source4: Some([10, 0, 0, 1].into()),
            source6: None,
            netns: None,
            bridge,
            behind: false,
            mac: None,
            veth: false,
            without_xdp: None,
            local: false,
        };
        let other = (7, device("eth1", None));
        let alone: Devices = [(5, device("br0", None)), other.clone()].into();
        let ports: Devices = [(3, device("eth0", Some(5))), (4, device("veth0", Some(5))), other].into();
        let mut store = Memory::new(0, 0);
        let behind = |store: &mut Memory| -> Vec<u32> {
            let mut marked: Vec<_> = store.devices().unwrap();
            marked.retain(|(_, value)| value.flags & flags::BEHIND != 0);
            marked.into_iter().map(|(index, _)| index).collect()
        };
        let mut report = Report::default();
        let mut turn = |store: &mut Memory, devices: &Devices| {
            let moves = put(store, devices, &mut report);
            let marked = behind(store);
            // Here programs move.
            prune(store, devices, &BTreeSet::new(), &mut report).unwrap();
            if moves {
                assert!(!put(store, devices, &mut report), "nothing is left to be taken back");
            }
            assert_eq!(behind(store), Vec::<u32>::new());
            (marked, moves)
        };
        assert_eq!(turn(&mut store, &alone), (vec![], false));
        assert_eq!(turn(&mut store, &ports), (vec![5], false), "the bridge's entry goes with its programs");
        assert_eq!(turn(&mut store, &ports), (vec![], false));
        assert_eq!(turn(&mut store, &alone), (vec![5], true));
        assert_eq!(turn(&mut store, &alone), (vec![], false));
        // Attempts at which no program moved, and nothing was pruned.
        turn(&mut store, &ports);
        for _ in 0..2 {
            assert!(put(&mut store, &alone, &mut Report::default()));
            assert_eq!(behind(&mut store), [5]);
        }
        assert_eq!(turn(&mut store, &alone), (vec![5], true));
        for _ in 0..2 {
            assert!(!put(&mut store, &ports, &mut Report::default()));
            assert_eq!(behind(&mut store), [5]);
        }
        assert_eq!(turn(&mut store, &ports), (vec![5], false));
    }

    #[test]
    fn devices_are_written_once_and_pruned() {
        let device = |name: &str| Device {
            source4: Some([10, 0, 0, 1].into()),
            netns: Some(6),
            ..Device::new(name, DeviceRole::Pod)
        };
        let devices: Devices = [(3, device("a")), (4, device("b"))].into();
        let mut store = Memory::new(0, 0);
        let mut report = Report::default();
        put(&mut store, &devices, &mut report);
        assert_eq!(report.writes, 2);
        assert!(store.devices().unwrap().iter().all(|(_, value)| value.netns == 7));
        put(&mut store, &devices, &mut report);
        let one: Devices = [(4, device("b"))].into();
        prune(&mut store, &one, &[3].into(), &mut report).unwrap();
        assert_eq!((report.writes, store.devices().unwrap().len()), (2, 2), "its filter could not be removed");
        prune(&mut store, &one, &BTreeSet::new(), &mut report).unwrap();
        assert_eq!(report.writes, 3);
        assert_eq!(store.devices().unwrap().len(), 1);
        // A port of a bridge, of another, of none; gone.
        for (n, bridge) in [Some(8), Some(8), Some(9), None, Some(9)].into_iter().enumerate() {
            let port: Devices = [(4, Device { bridge, ..device("b") })].into();
            put(&mut store, &port, &mut report);
            assert_eq!(store.bridges().unwrap(), bridge.map(|bridge| (4, bridge)).into_iter().collect::<Vec<_>>());
            assert_eq!(report.writes, [4, 4, 5, 6, 7][n]);
        }
        prune(&mut store, &Devices::new(), &BTreeSet::new(), &mut report).unwrap();
        assert_eq!((report.writes, store.bridges().unwrap().len()), (9, 0));
    }
}
