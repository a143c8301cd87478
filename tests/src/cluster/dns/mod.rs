//! The cluster's DNS, outside of the Service network: what a proxy does wrong is seen where it is done, not as a name unknown.
//!
//! It knows Services (A, AAAA, SRV, aliases of ExternalName), headless ones with the host names of their endpoints, and pods by
//! their addresses; everything else does not exist.

mod wire;

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::Value;

use self::wire::{A, AAAA, CNAME, Code, Question, Record, SRV};
use crate::world::Namespace;

const DOMAIN: [&str; 2] = ["cluster", "local"];

/// Objects by namespace and name.
type Objects = BTreeMap<(String, String), Value>;

#[derive(Default)]
struct Zone {
    services: Mutex<Objects>,
    slices: Mutex<Objects>,
}

/// Answers at `at` until the process ends.
pub(super) fn serve(namespace: &Namespace, at: IpAddr, kubeconfig: PathBuf) -> Result<()> {
    let at = SocketAddr::new(at, 53);
    let zone = Arc::new(Zone::default());
    let sockets = namespace.enter(|| Ok::<_, std::io::Error>((UdpSocket::bind(at)?, TcpListener::bind(at)?)))?;
    let (udp, tcp) = sockets.with_context(|| format!("listen at {at}"))?;
    for (resource, services) in [("/api/v1/services", true), ("/apis/discovery.k8s.io/v1/endpointslices", false)] {
        let (zone, namespace, kubeconfig) = (Arc::clone(&zone), namespace.clone(), kubeconfig.clone());
        std::thread::spawn(move || {
            loop {
                let objects = if services { &zone.services } else { &zone.slices };
                if let Err(error) = watch(&namespace, &kubeconfig, resource, objects) {
                    eprintln!("DNS: {resource}: {error:#}");
                }
                // The API server ends each watch after some time.
                sleep(Duration::from_millis(200));
            }
        });
    }
    let of_udp = Arc::clone(&zone);
    std::thread::spawn(move || {
        let mut message = [0; 1500];
        while let Ok((length, from)) = udp.recv_from(&mut message) {
            if let Some(answer) = message.get(..length).and_then(|message| of_udp.answer(message)) {
                // Who has gone needs no answer.
                let _gone = udp.send_to(&answer, from);
            }
        }
    });
    std::thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let zone = Arc::clone(&zone);
            std::thread::spawn(move || converse(&zone, stream));
        }
    });
    Ok(())
}

/// By TCP, each message has its length before it.
fn converse(zone: &Zone, mut stream: TcpStream) -> Option<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length).ok()?;
        let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut message).ok()?;
        let answer = zone.answer(&message)?;
        stream.write_all(&u16::try_from(answer.len()).ok()?.to_be_bytes()).ok()?;
        stream.write_all(&answer).ok()?;
    }
}

/// Follows a resource until the server ends that.
fn watch(namespace: &Namespace, kubeconfig: &PathBuf, resource: &str, objects: &Mutex<Objects>) -> Result<()> {
    let mut command = namespace.command("kubectl");
    ends_with_us(&mut command);
    let mut child = command
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .args(["get", "--raw", &format!("{resource}?watch=true&timeoutSeconds=3600")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("start kubectl")?;
    // All that there is comes first, as added; what went while nobody looked does not come.
    locked(objects).clear();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let event: Value = serde_json::from_str(&line?).context("an event of the API server")?;
            let object = &event["object"];
            let part = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
            let key = (part("namespace"), part("name"));
            match event["type"].as_str() {
                Some("ADDED" | "MODIFIED") => drop(locked(objects).insert(key, object.clone())),
                Some("DELETED") => drop(locked(objects).remove(&key)),
                // `ERROR`: the watch is over.
                _ => break,
            }
        }
    }
    let _gone = child.kill();
    child.wait().context("wait for kubectl")?;
    Ok(())
}

fn ends_with_us(command: &mut Command) {
    use std::os::unix::process::CommandExt as _;
    // SAFETY: the closure makes one system call, which is async-signal-safe, and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(Into::into));
    }
}

fn locked(objects: &Mutex<Objects>) -> MutexGuard<'_, Objects> {
    objects.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Zone {
    fn answer(&self, message: &[u8]) -> Option<Vec<u8>> {
        let question = Question::parse(message)?;
        let labels: Vec<&str> = question.labels.iter().map(String::as_str).collect();
        let Some(inside) = labels.strip_suffix(DOMAIN.as_slice()) else {
            // Not ours, and nobody else is to be asked.
            return Some(question.answer(Code::Unknown, &[]));
        };
        Some(match self.find(inside) {
            None => question.answer(Code::Unknown, &[]),
            Some(records) => {
                let kind = question.kind;
                let wanted = |record: &Record| match record {
                    Record::Address(IpAddr::V4(_)) => kind == A,
                    Record::Address(IpAddr::V6(_)) => kind == AAAA,
                    Record::Alias(_) => matches!(kind, A | AAAA | CNAME),
                    Record::Service(..) => kind == SRV,
                };
                let records: Vec<Record> = records.into_iter().filter(wanted).collect();
                question.answer(Code::Known, &records)
            }
        })
    }

    /// What there is of a name below the cluster's domain; `None`: no such name.
    fn find(&self, labels: &[&str]) -> Option<Vec<Record>> {
        match labels {
            [name, namespace, "svc"] => self.service(namespace, name),
            [host, name, namespace, "svc"] => self.endpoint(namespace, name, host),
            [port, protocol, name, namespace, "svc"] => self.port(namespace, name, port, protocol),
            [address, _, "pod"] => Some(vec![Record::Address(wire::dashed(address)?.into())]),
            _ => None,
        }
    }

    fn service(&self, namespace: &str, name: &str) -> Option<Vec<Record>> {
        let services = locked(&self.services);
        let spec = services.get(&(namespace.to_owned(), name.to_owned()))?["spec"].clone();
        // For itself alone: the name that an alias leads to may be one of these.
        drop(services);
        if let Some(alias) = spec["externalName"].as_str().filter(|_| spec["type"] == "ExternalName") {
            return Some(self.alias(alias));
        }
        if spec["clusterIP"] == "None" {
            return Some(self.endpoints(namespace, name).into_iter().map(|(_, ip)| Record::Address(ip)).collect());
        }
        Some(addresses(&spec["clusterIPs"]).map(Record::Address).collect())
    }

    /// It, and what it leads to, if that is known here: a resolver does not ask again.
    fn alias(&self, name: &str) -> Vec<Record> {
        let labels: Vec<&str> = name.trim_end_matches('.').split('.').collect();
        let inside = labels.strip_suffix(DOMAIN.as_slice()).and_then(|inside| match inside {
            // One alias of another would have no end.
            [name, namespace, "svc"] if !self.is_alias(namespace, name) => self.service(namespace, name),
            _ => None,
        });
        let mut records = vec![Record::Alias(name.to_owned())];
        records.extend(inside.into_iter().flatten());
        records
    }

    fn is_alias(&self, namespace: &str, name: &str) -> bool {
        let services = locked(&self.services);
        let service = services.get(&(namespace.to_owned(), name.to_owned()));
        service.is_some_and(|service| service["spec"]["type"] == "ExternalName")
    }

    /// Of a headless Service: host names and addresses of those that are ready, or published all the same (the slice says so).
    fn endpoints(&self, namespace: &str, name: &str) -> Vec<(String, IpAddr)> {
        let slices = locked(&self.slices);
        let of_service = slices.values().filter(|slice| {
            slice["metadata"]["namespace"] == namespace
                && slice["metadata"]["labels"]["kubernetes.io/service-name"] == name
        });
        let endpoints = of_service.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        let ready = endpoints.filter(|endpoint| endpoint["conditions"]["ready"] != false);
        let named = ready.flat_map(|endpoint| {
            let host = endpoint["hostname"].as_str().unwrap_or_default().to_owned();
            addresses(&endpoint["addresses"]).map(move |ip| (host.clone(), ip))
        });
        named.collect()
    }

    fn endpoint(&self, namespace: &str, name: &str, host: &str) -> Option<Vec<Record>> {
        let all = self.endpoints(namespace, name).into_iter();
        let found: Vec<Record> = all.filter(|(known, _)| known == host).map(|(_, ip)| Record::Address(ip)).collect();
        (!found.is_empty()).then_some(found)
    }

    fn port(&self, namespace: &str, name: &str, port: &str, protocol: &str) -> Option<Vec<Record>> {
        let services = locked(&self.services);
        let spec = &services.get(&(namespace.to_owned(), name.to_owned()))?["spec"];
        let ports = spec["ports"].as_array()?.iter();
        let named = |one: &&Value| {
            one["name"].as_str() == port.strip_prefix('_')
                && one["protocol"].as_str().map(str::to_lowercase).as_deref() == protocol.strip_prefix('_')
        };
        let number = ports.clone().find(named)?["port"].as_u64()?;
        let target = format!("{name}.{namespace}.svc.{}", DOMAIN.join("."));
        Some(vec![Record::Service(u16::try_from(number).ok()?, target)])
    }
}

fn addresses(list: &Value) -> impl Iterator<Item = IpAddr> {
    list.as_array().into_iter().flatten().filter_map(|ip| ip.as_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn services_are_found_by_name() {
        let zone = Zone::default();
        let key = |name: &str| ("default".to_owned(), name.to_owned());
        locked(&zone.services).extend([
            (key("web"), json!({"spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"]}})),
            (key("elsewhere"), json!({"spec": {"type": "ExternalName", "externalName": "example.com"}})),
            (key("alias"), json!({"spec": {"type": "ExternalName", "externalName": "web.default.svc.cluster.local"}})),
            (key("headless"), json!({"spec": {"clusterIP": "None"}})),
        ]);
        locked(&zone.slices).insert(
            key("headless-1"),
            json!({
                "metadata": {"namespace": "default", "labels": {"kubernetes.io/service-name": "headless"}},
                "endpoints": [
                    {"addresses": ["10.56.1.2"], "hostname": "a", "conditions": {"ready": true}},
                    {"addresses": ["10.56.1.3"], "hostname": "b", "conditions": {"ready": false}},
                ],
            }),
        );
        let found = |labels: &[&str]| {
            let records = zone.find(labels)?.into_iter();
            let shown = records.map(|record| match record {
                Record::Address(ip) => ip.to_string(),
                Record::Alias(name) => name,
                Record::Service(port, name) => format!("{port} {name}"),
            });
            Some(shown.collect::<Vec<_>>().join(" "))
        };
        assert_eq!(found(&["web", "default", "svc"]).as_deref(), Some("10.96.0.7"));
        assert_eq!(found(&["elsewhere", "default", "svc"]).as_deref(), Some("example.com"));
        assert_eq!(found(&["alias", "default", "svc"]).as_deref(), Some("web.default.svc.cluster.local 10.96.0.7"));
        assert_eq!(found(&["headless", "default", "svc"]).as_deref(), Some("10.56.1.2"));
        assert_eq!(found(&["a", "headless", "default", "svc"]).as_deref(), Some("10.56.1.2"));
        assert_eq!(found(&["b", "headless", "default", "svc"]), None);
        assert_eq!(found(&["other", "default", "svc"]), None);
        assert_eq!(found(&["10-56-1-2", "default", "pod"]).as_deref(), Some("10.56.1.2"));
    }
}
