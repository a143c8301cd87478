//! A thousand connections held, new ones all the time, and who answered which.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use proxy_tests::{
    pod::{
        hold,
        storm::{self, Answered},
    },
    world::{Client, Family, Place, World, vip},
};

use crate::{BLUE, RED, names, node_ports, number, origins, pods_of, web};

pub(super) struct Traffic {
    holds: Vec<(String, Client)>,
    storms: Vec<Storm>,
}

/// New connections to one Service over one family.
struct Storm {
    what: String,
    service: &'static str,
    family: Family,
    client: Client,
}

/// What became of them.
pub(super) struct Stormed {
    pub(super) what: String,
    pub(super) service: &'static str,
    pub(super) family: Family,
    pub(super) log: Vec<Answered>,
}

impl Traffic {
    /// A thousand connections held, and new ones from everywhere all the time.
    pub(super) fn start(world: &World) -> Result<Self> {
        let [client, node, outside] = origins(world);
        let flows = [
            // Who, to which Service, connections held, connections made each second.
            (client, Family::V4, RED, 250, 80),
            (client, Family::V6, RED, 150, 60),
            (client, Family::V4, BLUE, 200, 60),
            (node, Family::V4, RED, 100, 40),
            (node, Family::V6, BLUE, 100, 40),
            (outside, Family::V4, RED, 100, 40),
            (outside, Family::V6, BLUE, 100, 40),
        ];
        let mut traffic = Self { holds: Vec::new(), storms: Vec::new() };
        for (from, family, service, held, rate) in flows {
            let to = web(family, number(service));
            let expect = names(&pods_of(world, service)).into_iter().collect::<Vec<_>>().join(",");
            let hold = ["hold", &to.to_string(), "--interval=400"].map(str::to_owned).into_iter();
            let hold: Vec<String> =
                hold.chain([format!("--connections={held}"), format!("--expect={expect}")]).collect();
            traffic.holds.push((format!("{} -> {to}", from.name), from.start(&world.programs().testpod, &hold)?));
            traffic.storm(world, from, family, service, to, &[format!("--rate={rate}")])?;
        }
        for (_, hold) in &mut traffic.holds {
            hold.wait_for_line("ready", Duration::from_secs(15))?;
        }
        Ok(traffic)
    }

    /// New connections from outside to NodePorts of both nodes; datagrams to those of the Service whose endpoints answer while they terminate.
    pub(super) fn at_node_ports(world: &World) -> Result<Self> {
        let mut traffic = Self { holds: Vec::new(), storms: Vec::new() };
        for (node, service) in [(1, RED), (1, BLUE), (2, RED), (2, BLUE)] {
            let [web, dns] = node_ports(number(service));
            for family in Family::BOTH {
                let at = |port| world.node(node).place.at(family, port);
                traffic.storm(world, world.outside(), family, service, at(web), &["--rate=40".to_owned()])?;
                if service == RED {
                    // A flow that is known goes on with its backend: each from a port of its own.
                    let udp = ["--udp", "--rate=40", "--source-port=40000"].map(str::to_owned);
                    traffic.storm(world, world.outside(), family, service, at(dns), &udp)?;
                }
            }
        }
        Ok(traffic)
    }

    /// And datagrams, each from a socket and a port of its own. None from outside: they are masqueraded, to ports out of those that
    /// the node's own sockets are bound to where other cases ask.
    pub(super) fn add_datagrams(&mut self, world: &World, service: &'static str) -> Result<()> {
        let mut port = 40_000;
        for from in [world.pod("client"), &world.node(1).place] {
            for family in Family::BOTH {
                let to = SocketAddr::new(vip(family, number(service)), 53);
                let args = ["--udp".to_owned(), "--rate=30".to_owned(), format!("--source-port={port}")];
                self.storm(world, from, family, service, to, &args)?;
            }
            port += storm::PORTS;
        }
        Ok(())
    }

    fn storm(
        &mut self,
        world: &World,
        from: &Place,
        family: Family,
        service: &'static str,
        to: SocketAddr,
        extra: &[String],
    ) -> Result<()> {
        let expect = names(&pods_of(world, service)).into_iter().collect::<Vec<_>>().join(",");
        let mut args = ["storm", "--log", "--seconds=300", &to.to_string()].map(str::to_owned).to_vec();
        args.push(format!("--expect={expect}"));
        args.extend_from_slice(extra);
        let mut client = from.start(&world.programs().testpod, &args)?;
        client.wait_for_line("ready", Duration::from_secs(15))?;
        self.storms.push(Storm { what: format!("{} -> {to}", from.name), service, family, client });
        Ok(())
    }

    /// Nothing broke, nothing failed, nobody wrong answered. At least so many connections were held.
    pub(super) fn finish(self, least: usize) -> Result<Vec<Stormed>> {
        let mut held = 0;
        let mut trouble = Vec::new();
        for (what, client) in self.holds {
            let report: hold::Report = client.finish(Duration::from_secs(10))?;
            held += report.connections;
            if !report.broken.is_empty() || !report.wrong.is_empty() || report.rounds < 2 {
                trouble.push(format!(
                    "{what}: {} of {} connections broke, {} wrong answers, {} rounds; first: {:?}",
                    report.broken.len(),
                    report.connections,
                    report.wrong.len(),
                    report.rounds,
                    report.broken.iter().chain(&report.wrong).next()
                ));
            }
        }
        let mut tries = 0;
        let mut stormed = Vec::new();
        for Storm { what, service, family, client } in self.storms {
            let report: storm::Report = client.finish(Duration::from_secs(10))?;
            tries += report.tries;
            if !report.failures.is_empty() || !report.wrong.is_empty() || report.tries == 0 {
                trouble.push(format!(
                    "{what}: of {} new connections failed {:?}, wrong {:?}",
                    report.tries, report.failures, report.wrong
                ));
            }
            stormed.push(Stormed { what, service, family, log: report.log });
        }
        ensure!(trouble.is_empty(), "{}", trouble.join("\n"));
        ensure!(held >= least, "only {held} connections were held");
        println!("     {held} connections held, {tries} made");
        Ok(stormed)
    }
}
