//! An API server of a few lines, for changes faster than a real one takes them: it lists what it holds, keeps watches open,
//! and sends each change the moment it is made. It checks nothing and forgets nothing. kube-proxy is content with it, too.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// Kind, group and version, and where it is listed.
const KINDS: [(&str, &str, &str); 4] = [
    ("Service", "v1", "/api/v1/services"),
    ("EndpointSlice", "discovery.k8s.io/v1", "/apis/discovery.k8s.io/v1/endpointslices"),
    ("Node", "v1", "/api/v1/nodes"),
    ("ServiceCIDR", "networking.k8s.io/v1", "/apis/networking.k8s.io/v1/servicecidrs"),
];

#[derive(Clone, Default)]
pub struct Feed(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// `resourceVersion` of the last change.
    version: u64,
    /// As they are listed, by kind and name.
    objects: BTreeMap<(String, String), String>,
    /// Every change as a chunk of an answer to a watch.
    changes: Vec<Change>,
    watches: Vec<(Selector, TcpStream)>,
}

impl State {
    fn prepare(&self, object: &Value) -> Result<Ready> {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        let kind = text("/kind").context("an object without kind")?;
        let name = text("/metadata/name").context("an object without name")?;
        let version = self.version + 1;
        let mut object = object.clone();
        let (_, group, _) =
            KINDS.iter().find(|(known, ..)| *known == kind).with_context(|| format!("no {kind} is listed"))?;
        object["apiVersion"] = (*group).into();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        object["metadata"]["uid"] = format!("{kind}-{name}").into();
        let object = object.to_string();
        let known = self.objects.contains_key(&(kind.clone(), name.clone()));
        let event = format!(r#"{{"type":"{}","object":{object}}}"#, if known { "MODIFIED" } else { "ADDED" });
        let chunk = format!("{:x}\r\n{event}\n\r\n", event.len() + 1).into_bytes();
        Ok(Ready { object, change: Change { version, kind, name, chunk } })
    }

    fn send(&mut self, Ready { object, change }: Ready) {
        // Who has gone away needs nothing any more.
        self.watches.retain_mut(|(of, stream)| {
            !of.matches(&change.kind, &change.name) || stream.write_all(&change.chunk).is_ok()
        });
        self.version = change.version;
        self.objects.insert((change.kind.clone(), change.name.clone()), object);
        self.changes.push(change);
    }
}

struct Change {
    version: u64,
    kind: String,
    name: String,
    chunk: Vec<u8>,
}

/// A change with all its text made, so that sending it is one write for each watch.
pub struct Ready {
    object: String,
    change: Change,
}

/// What a request is about: a kind, and one name if it selects by name, as an agent does for its own Node.
#[derive(Clone, Debug)]
struct Selector {
    kind: &'static str,
    name: Option<String>,
}

impl Selector {
    fn matches(&self, kind: &str, name: &str) -> bool {
        self.kind == kind && self.name.as_ref().is_none_or(|wanted| wanted == name)
    }
}

impl Feed {
    /// Listens on the loopback of the namespace that the calling thread is in, until the program ends.
    pub fn serve(&self) -> Result<SocketAddr> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen for the feed")?;
        let address = listener.local_addr()?;
        let feed = self.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let feed = feed.clone();
                // A connection that breaks off is the agent's end.
                thread::spawn(move || feed.connection(stream));
            }
        });
        Ok(address)
    }

    /// Creates or changes an object: one event on every watch of its kind.
    pub fn set(&self, object: &Value) -> Result<()> {
        let mut state = self.state();
        let ready = state.prepare(object)?;
        state.send(ready);
        Ok(())
    }

    /// The first half of [`Self::set`]; nothing else may be set before it is sent.
    pub fn prepare(&self, object: &Value) -> Result<Ready> {
        self.state().prepare(object)
    }

    /// The second half.
    pub fn send(&self, ready: Ready) {
        self.state().send(ready);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connection(&self, mut stream: TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let mut request = String::new();
            if reader.read_line(&mut request)? == 0 {
                return Ok(());
            }
            let (mut header, mut length) = (String::new(), 0);
            while reader.read_line(&mut header)? > 2 {
                let (name, value) = header.split_once(':').unwrap_or_default();
                if name.eq_ignore_ascii_case("content-length") {
                    length = value.trim().parse()?;
                }
                header.clear();
            }
            // Events are written, which are not kept.
            io::copy(&mut (&mut reader).take(length), &mut io::sink())?;
            let target = request.split(' ').nth(1).unwrap_or_default();
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let kind = KINDS.iter().find(|(_, _, listed)| path.starts_with(listed));
            let Some(&(kind, version, _)) = kind else {
                stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
                continue;
            };
            if query.contains("sendInitialEvents=true") {
                // Who is refused a list by way of a watch asks for a list.
                stream.write_all(b"HTTP/1.1 422 Unprocessable Entity\r\nContent-Length: 0\r\n\r\n")?;
                continue;
            }
            let name = query.split('&').find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name%3D"));
            let of = Selector { kind, name: name.map(str::to_owned) };
            if query.contains("watch=") {
                let seen = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse().ok());
                self.watch(of, seen.unwrap_or(0), &mut stream)?;
            } else {
                let body = self.list(&of, version);
                let length = body.len();
                write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
                )?;
            }
        }
    }

    fn list(&self, of: &Selector, version: &str) -> String {
        let state = self.state();
        let selected = state.objects.iter().filter(|((kind, name), _)| of.matches(kind, name));
        let items: Vec<&str> = selected.map(|(_, item)| item.as_str()).collect();
        format!(
            r#"{{"kind":"{}List","apiVersion":"{version}","metadata":{{"resourceVersion":"{}"}},"items":[{}]}}"#,
            of.kind,
            state.version,
            items.join(",")
        )
    }

    /// What happened since `seen`, and what happens from now on; no change falls between the two.
    fn watch(&self, of: Selector, seen: u64, stream: &mut TcpStream) -> Result<()> {
        let mut state = self.state();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        for change in
            state.changes.iter().filter(|change| change.version > seen && of.matches(&change.kind, &change.name))
        {
            stream.write_all(&change.chunk)?;
        }
        state.watches.push((of, stream.try_clone()?));
        Ok(())
    }
}

/// Writes a kubeconfig that leads to a feed.
pub fn kubeconfig(dir: &Path, at: SocketAddr) -> Result<PathBuf> {
    let path = dir.join(format!("feed-{}.kubeconfig", at.port()));
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "feed", "cluster": {"server": format!("http://{at}")}}],
        "users": [{"name": "feed", "user": {}}],
        "contexts": [{"name": "feed", "context": {"cluster": "feed", "user": "feed"}}],
        "current-context": "feed",
    });
    std::fs::write(&path, config.to_string()).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}
