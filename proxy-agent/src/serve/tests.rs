use std::time::Instant;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{sleep, timeout},
};

use super::*;
use crate::{
    dataplane::Failure,
    desired::{FamilyCheck, HealthCheck, HealthChecks, health_doors},
    model::{About, Family, Notice, NoticeKind, ServiceKey},
    status::{FrontendState, SourceState, report::tests::frontend},
};

async fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

async fn options() -> Options {
    Options {
        healthz: Some(free_address().await),
        metrics: Some(free_address().await),
        bind_address_hard_fail: false,
        sync_period: Duration::from_secs(30),
        socket_lb: Some("all"),
        bpffs: Some("/sys/fs/bpf/test".into()),
        probe: Arc::new(|| Ok(Readings::default())),
        requests: Arc::default(),
        notices: Notices { sender: mpsc::channel(8).0, counts: Arc::default() },
        configuration: watch::channel(Arc::default()).1,
        verbosity: None,
    }
}

/// Status line and body. Whoever had the address before may still take a connection and drop it.
async fn get(addr: Option<SocketAddr>, path: &str) -> (String, String) {
    loop {
        match exchange(addr.unwrap(), path).await {
            Ok(answer) if !answer.is_empty() => {
                let (head, body) = answer.split_once("\r\n\r\n").unwrap();
                return (head.lines().next().unwrap().to_owned(), body.to_owned());
            }
            _ => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn exchange(addr: SocketAddr, path: &str) -> std::io::Result<String> {
    send(addr, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await
}

async fn send(addr: SocketAddr, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(addr).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn answers_on_both_addresses() {
    let options = options().await;
    let (status, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));
    let cancel = CancellationToken::new();
    let server = tokio::spawn(run(options.clone(), watched, cancel.clone()));

    assert_eq!(get(options.healthz, "/healthz").await.0, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(get(options.healthz, "/livez").await.0, "HTTP/1.1 200 OK");
    let node_facts = Some(Arc::default());
    let ready =
        Status { ready: true, node_facts, source: SourceState::Synced, ..Status::starting("ebpf", "n1".into()) };
    status.send_replace(Arc::new(ready));
    let (line, body) = get(options.healthz, "/healthz").await;
    assert_eq!(line, "HTTP/1.1 200 OK");
    assert!(body.contains("lastUpdated"), "{body}");

    assert_eq!(get(options.metrics, "/proxyMode").await.1, "ebpf");
    let (_, body) = get(options.metrics, "/status").await;
    assert_eq!(serde_json::from_str::<report::Report>(&body).unwrap().node, "n1");
    assert_eq!(get(options.metrics, "/frontends").await.1, "[]");
    let (_, body) = get(options.metrics, "/metrics").await;
    assert!(body.contains("kubeproxy_proxy_healthz_total{code=\"503\"} 1"), "{body}");
    let (_, body) = get(options.metrics, "/metrics/slis").await;
    assert!(body.contains("kubernetes_healthcheck{name=\"proxy\",type=\"healthz\"} 1"), "{body}");
    // What a Prometheus server says it takes; the names must not depend on it.
    let accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
    let request = format!("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n");
    let answer = send(options.metrics.unwrap(), &request).await.unwrap();
    assert!(answer.contains("Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{answer}");
    assert!(answer.contains("\n# TYPE kubeproxy_proxy_healthz_total counter\n"), "{answer}");
    assert_eq!(get(options.healthz, "/metrics").await.0, "HTTP/1.1 404 Not Found");

    cancel.cancel();
    server.await.unwrap().unwrap();
}

/// A120: as kube-proxy has them, the one always, the other if it is asked for.
#[tokio::test]
async fn what_is_in_force_is_shown_and_how_much_is_logged_is_set() {
    let flags = [("proxy-mode".to_owned(), "auto".to_owned()), ("v".to_owned(), "2".to_owned())].into();
    let configz = "{\"kubeproxy.config.k8s.io\":{}}".to_owned();
    let (shown, configuration) = watch::channel(Arc::new(Shown { configz, flags, flagz: true, statusz: true }));
    let set = Arc::new(Mutex::new(Vec::new()));
    let verbosity: SetVerbosity = {
        let set = Arc::clone(&set);
        Arc::new(move |number| {
            set.lock().unwrap().push(number);
            if number == 99 { Err("no such filter".to_owned()) } else { Ok(()) }
        })
    };
    let with = Options { configuration, verbosity: Some(verbosity), ..options().await };
    let without = Options { healthz: None, ..options().await };
    let cancel = CancellationToken::new();
    let (_status, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));
    for options in [&with, &without] {
        tokio::spawn(run(options.clone(), watched.clone(), cancel.clone()));
    }
    assert_eq!(get(with.metrics, "/configz").await.1, "{\"kubeproxy.config.k8s.io\":{}}");
    let head = exchange(with.metrics.unwrap(), "/configz").await.unwrap();
    for header in ["Content-Type: application/json\r\n", "X-Content-Type-Options: nosniff\r\n"] {
        assert!(head.contains(header), "{head}");
    }
    let (_, flagz) = get(with.metrics, "/flagz").await;
    assert!(flagz.contains("\nproxy-agent flagz\nWarning: ") && flagz.ends_with("\nproxy-mode=auto\nv=2\n"), "{flagz}");
    let (_, statusz) = get(with.metrics, "/statusz").await;
    assert!(statusz.contains("\nUp: 0 hr 00 min ") && statusz.contains("\nPaths: /configz /flagz "), "{statusz}");
    for (page, kind, path, value) in [
        ("/flagz", "Flagz", "/flags/proxy-mode", "auto"),
        ("/statusz", "Statusz", "/binaryVersion", env!("CARGO_PKG_VERSION")),
        ("/statusz", "Statusz", "/metadata/name", "proxy-agent"),
    ] {
        let accept = format!("application/json;v=v1beta1;g=config.k8s.io;as={kind}");
        let request = format!("GET {page} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n");
        let answer = send(with.metrics.unwrap(), &request).await.unwrap();
        let object: serde_json::Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!((&object["kind"], &object["apiVersion"]), (&kind.into(), &"config.k8s.io/v1beta1".into()));
        assert_eq!(object.pointer(path), Some(&value.into()), "{object}");
        assert!(
            answer.contains(&format!("Content-Type: application/json;g=config.k8s.io;v=v1beta1;as={kind}\r\n")),
            "{answer}"
        );
        // The same as YAML, in the version from before, of which is said that it is to go.
        let accept = format!("application/yaml;v=v1alpha1;g=config.k8s.io;as={kind}");
        let request = format!("GET {page} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n");
        let answer = send(with.metrics.unwrap(), &request).await.unwrap();
        assert!(answer.contains("\r\nWarning: 299 - \"This version of the "), "{answer}");
        let yaml: serde_json::Value = serde_saphyr::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!((&yaml["apiVersion"], yaml.pointer(path)), (&"config.k8s.io/v1alpha1".into(), object.pointer(path)));
    }
    for page in zpages::PATHS {
        assert_ne!(get(with.metrics, page).await.0, "HTTP/1.1 404 Not Found", "{page}");
    }
    shown.send_replace(Arc::new(Shown { configz: "{}".to_owned(), ..Shown::default() }));
    assert_eq!(get(with.metrics, "/configz").await.1, "{}", "what changes is shown");
    for page in ["/flagz", "/statusz"] {
        assert_eq!(get(with.metrics, page).await.0, "HTTP/1.1 404 Not Found", "{page} without its gate");
    }
    for page in ["/configz", "/flagz", "/statusz", "/debug/flags/v"] {
        assert_eq!(get(with.healthz, page).await.0, "HTTP/1.1 404 Not Found", "{page} where health is served");
    }

    let ask = async |to: &Options, method: &str, body: &str| {
        let length = body.len();
        let request = format!("{method} /debug/flags/v HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
        let answer = send(to.metrics.unwrap(), &request).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().to_owned(), body.to_owned())
    };
    let (code, body) = ask(&with, "PUT", "4").await;
    assert_eq!((code.as_str(), body.as_str()), ("200", "successfully set klog.logging.verbosity to 4\n"));
    assert_eq!(ask(&with, "PUT", "10").await.0, "200");
    for wrong in ["", "-1", "+1", "1\n", "debug", "4294967295", "4294967296"] {
        assert_eq!(ask(&with, "PUT", wrong).await.0, "400", "{wrong}");
    }
    assert_eq!(ask(&with, "PUT", "99").await, ("400".to_owned(), "no such filter\n".to_owned()));
    assert_eq!(ask(&with, "GET", "").await.0, "406");
    assert_eq!(*set.lock().unwrap(), [4, 10, 99]);
    assert_eq!(get(without.metrics, "/configz").await.0, "HTTP/1.1 200 OK");
    assert_eq!(ask(&without, "PUT", "4").await.0, "404");
    cancel.cancel();
}

fn checks(ports: &[(&str, u16, usize)]) -> Arc<HealthChecks> {
    let check = |&(name, port, local): &(&str, u16, usize)| {
        let listen = |family| vec![if family == Family::V4 { "127.0.0.1" } else { "::1" }.parse().unwrap()];
        let family = |family| (family, FamilyCheck { listen: listen(family), local: local * (family as usize + 1) });
        let families = Family::BOTH.map(family).into();
        let check = HealthCheck { uid: "u".into(), port: port.try_into().unwrap(), families };
        (ServiceKey::new("default", name), check)
    };
    Arc::new(ports.iter().map(check).collect())
}

/// A server that is told what to be ready for.
struct Told {
    status: watch::Sender<Arc<Status>>,
    told: mpsc::Receiver<Notice>,
    metrics: Option<SocketAddr>,
    cancel: CancellationToken,
}

impl Told {
    async fn new() -> Self {
        let (sender, told) = mpsc::channel(8);
        let notices = Notices { sender, counts: Arc::default() };
        let options = Options { healthz: None, notices, ..options().await };
        let (status, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));
        let (cancel, metrics) = (CancellationToken::new(), options.metrics);
        tokio::spawn(run(options, watched, cancel.clone()));
        Self { status, told, metrics, cancel }
    }

    fn tell(&self, ready: bool, ports: &[(&str, u16, usize)]) {
        let (health_checks, source) = (checks(ports), SourceState::Synced);
        // As the sync loop has it: the same value as long as the same ports are asked for.
        let before = Arc::clone(&self.status.borrow().health_doors);
        let doors = health_doors(&health_checks);
        let health_doors = if *before == doors { before } else { Arc::new(doors) };
        self.status.send_replace(Arc::new(Status {
            ready,
            health_checks,
            health_doors,
            source,
            ..Status::starting("ebpf", "n1".into())
        }));
    }
}

async fn is_closed(addr: SocketAddr) -> bool {
    for _ in 0..100 {
        if TcpStream::connect(addr).await.is_err() {
            return true;
        }
        sleep(Duration::from_millis(20)).await;
    }
    false
}

/// A111-A114: the answer is kube-proxy's, and ports come, move and go.
#[tokio::test]
async fn health_check_ports_follow_the_status() {
    let told = Told::new().await;
    let (v4, other) = (free_address().await, free_address().await);
    let v6 = SocketAddr::new("::1".parse().unwrap(), v4.port());
    told.tell(true, &[("web", v4.port(), 1)]);
    let (line, body) = get(Some(v4), "/any/path").await;
    assert_eq!(line, "HTTP/1.1 200 OK");
    let expected = "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}";
    assert_eq!(body, expected);
    let head = exchange(v6, "/").await.unwrap();
    for header in
        ["Content-Type: application/json", "X-Content-Type-Options: nosniff", "X-Load-Balancing-Endpoint-Weight: 2"]
    {
        assert!(head.contains(&format!("{header}\r\n")), "{head}");
    }

    told.tell(true, &[("web", v4.port(), 0)]);
    let (line, body) = get(Some(v4), "/").await;
    assert!(line.contains("503") && body.contains("\"localEndpoints\": 0") && body.contains("true"), "{line} {body}");
    told.tell(false, &[("web", v4.port(), 1)]);
    let (line, body) = get(Some(v4), "/").await;
    assert!(line.contains("503") && body.contains("\"localEndpoints\": 1") && body.contains("false"), "{line} {body}");

    // What is not in force as planned is nothing to send traffic to, in its family.
    let mut degraded = Status::clone(&told.status.borrow());
    degraded.ready = true;
    let full = |(addr, name)| frontend(addr, name, FrontendState::Degraded(Failure::Retry("full".into())));
    degraded.frontends = Arc::new([("10.96.0.1", "web"), ("fd00::1", "other")].map(full).into());
    degraded.degraded = Arc::new(Status::degraded_of(&degraded.frontends));
    told.status.send_replace(Arc::new(degraded));
    let (line, body) = get(Some(v4), "/").await;
    assert!(line.contains("503") && body.contains("\"serviceProxyHealthy\": false"), "{line} {body}");
    assert!(get(Some(v6), "/").await.0.contains("200"));

    // The port passes from one Service to another, which had it elsewhere.
    told.tell(true, &[("web", v4.port(), 1), ("shop", other.port(), 1)]);
    assert!(get(Some(other), "/").await.1.contains("shop"));
    told.tell(true, &[("shop", v4.port(), 1)]);
    assert!(is_closed(other).await, "{other} is still open");
    assert!(get(Some(v4), "/").await.1.contains("shop"));
    told.tell(true, &[]);
    assert!(is_closed(v4).await && is_closed(v6).await, "{v4} is still open");
    told.cancel.cancel();
}

/// A115: said once, tried again, and nothing to the others.
#[tokio::test]
async fn a_health_check_port_that_is_taken_is_said_and_tried_again() {
    let mut told = Told::new().await;
    let (taken, free) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), free_address().await);
    let addr = taken.local_addr().unwrap();
    told.tell(true, &[("web", addr.port(), 1), ("shop", free.port(), 1)]);
    assert!(get(Some(free), "/").await.0.contains("200"));
    // Nobody says which comes first.
    let (mut first, second) = (told.told.recv().await.unwrap(), told.told.recv().await.unwrap());
    let mut warning = second;
    if first.about != About::Node {
        std::mem::swap(&mut first, &mut warning);
    }
    // A145.
    assert_eq!((first.about, first.kind, first.reason), (About::Node, NoticeKind::Normal, "Starting"));
    let about = About::Service { key: ServiceKey::new("default", "web"), uid: "u".into() };
    assert_eq!((warning.about, warning.reason), (about, "FailedToStartServiceHealthcheck"));
    assert!(warning.note.contains("Address already in use") && warning.note.contains("n1"), "{}", warning.note);
    let (_, body) = get(told.metrics, "/status").await;
    let report: report::Report = serde_json::from_str(&body).unwrap();
    let shown: Vec<_> = report.health_checks.iter().map(|check| (check.listening.len(), check.failed.len())).collect();
    assert_eq!(shown, [(2, 0), (1, 1)], "{report:?}");
    assert!(report.problems["Service default/web"][0].contains("free the port"), "{report:?}");
    let (_, metrics) = get(told.metrics, "/metrics").await;
    assert!(metrics.contains("proxy_agent_health_check_ports{state=\"failed\"} 1"), "{metrics}");

    drop(taken);
    let answer = timeout(Duration::from_secs(10), get(Some(addr), "/")).await.unwrap();
    assert!(answer.1.contains("web"), "{answer:?}");
    let (_, body) = get(told.metrics, "/status").await;
    assert!(serde_json::from_str::<report::Report>(&body).unwrap().problems.is_empty());
    assert!(told.told.try_recv().is_err(), "said twice");
    told.cancel.cancel();
}

/// A122: an Event on the Node, once, and another try; or the end.
#[tokio::test]
async fn a_taken_address_is_tried_again_or_ends_the_process() {
    let (sender, mut told) = mpsc::channel(8);
    let options = Options { notices: Notices { sender, counts: Arc::default() }, ..options().await };
    let taken = TcpListener::bind(options.healthz.unwrap()).await.unwrap();
    let (_status, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));
    let mut failure = async || loop {
        let Notice { about, reason, note, .. } = timeout(Duration::from_secs(20), told.recv()).await.unwrap().unwrap();
        if reason != "Starting" {
            assert_eq!(about, About::Node);
            break (reason, note);
        }
    };

    let strict = Options { bind_address_hard_fail: true, ..options.clone() };
    let error = run(strict, watched.clone(), CancellationToken::new()).await.unwrap_err().to_string();
    assert!(error.contains("--healthz-bind-address") && error.contains("Address already in use"), "{error}");
    assert_eq!(failure().await, ("FailedToStartProxierHealthcheck", error.clone()));

    let cancel = CancellationToken::new();
    let server = tokio::spawn(run(options.clone(), watched.clone(), cancel.clone()));
    assert_eq!(get(options.metrics, "/livez").await.0, "HTTP/1.1 200 OK", "the other address is served meanwhile");
    assert_eq!(failure().await, ("FailedToStartProxierHealthcheck", error));
    drop(taken);
    assert_eq!(get(options.healthz, "/livez").await.0, "HTTP/1.1 200 OK");
    cancel.cancel();
    server.await.unwrap().unwrap();

    let _taken = TcpListener::bind(options.metrics.unwrap()).await.unwrap();
    let strict = Options { bind_address_hard_fail: true, ..options };
    let error = run(strict, watched, CancellationToken::new()).await.unwrap_err().to_string();
    assert_eq!(failure().await, ("FailedToStartMetricServer", error));
}

#[tokio::test]
async fn silent_clients_do_not_keep_others_out() {
    let options = options().await;
    let (_status, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));
    let cancel = CancellationToken::new();
    let server = tokio::spawn(run(options.clone(), watched, cancel.clone()));
    get(options.healthz, "/livez").await;

    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(options.healthz.unwrap()).await.unwrap());
    }
    let started = Instant::now();
    let answer = timeout(Duration::from_secs(25), get(options.healthz, "/livez")).await;
    assert_eq!(answer.map(|(line, _)| line).unwrap(), "HTTP/1.1 200 OK", "after {:?}", started.elapsed());
    cancel.cancel();
    server.await.unwrap().unwrap();
}
