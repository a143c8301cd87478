//! The world itself, with no agent in it: what must hold before a proxy is put to the test.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use proxy_tests::{
    pod::socket::Transport,
    suite::Suite,
    world::{Ask, Family, Place, Programs, Spec, Topology, World, vip},
};

/// Set for a child that makes a world and leaves it behind.
const CHILD: &str = "PROXY_WORLD_CHILD";

fn main() -> ExitCode {
    if std::env::var_os(CHILD).is_some() {
        return child();
    }
    let mut suite = Suite::new("world");
    if let Some(reason) = World::unavailable() {
        suite.skip("world", &reason);
        return suite.finish();
    }
    if let Err(error) = proxy_tests::world::cleanup_on_signals().and_then(|()| World::sweep().map(drop)) {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    for topology in Topology::ALL {
        for rp_filter in [false, true] {
            // Nodes and pods are reached by different ways there, as with IPIP: no place for a strict filter.
            if rp_filter && topology == Topology::Tun {
                continue;
            }
            let name = format!("{}/rp_filter={}", topology.name(), u8::from(rp_filter));
            if suite.wants_group(&name) {
                shape(&mut suite, &name, &Spec { rp_filter, ..Spec::two_nodes(topology) });
            }
        }
    }
    suite.case("a dropped world leaves nothing", dropped_world_leaves_nothing);
    suite.case("a world whose owner was killed is swept", killed_owner_is_swept);
    suite.case("SIGINT removes the world", sigint_removes_the_world);
    suite.finish()
}

fn shape(suite: &mut Suite, name: &str, spec: &Spec) {
    // No agent is started here: an empty path is never used.
    let programs = Programs::find_testpod().map(|testpod| Programs { testpod, agent: "".into() });
    let world = match programs.and_then(|programs| World::new(spec, programs)) {
        Ok(world) => world,
        Err(error) => return suite.fail(name, &error),
    };
    suite.case(&format!("{name}/pods and nodes reach each other and see true sources"), || everybody(&world));
    suite.case(&format!("{name}/outside reaches nodes but no pod"), || outside(&world));
    suite.case(&format!("{name}/what nobody translates is seen in the sink"), || leaks_are_seen(&world));
    if spec.topology == Topology::Routed {
        suite.case(&format!("{name}/rules are found and taken, whatever tool made them"), || rules_are_taken(&world));
    }
}

/// What one dataplane leaves would answer in the place of the next.
fn rules_are_taken(world: &World) -> Result<()> {
    let namespace = &world.node(1).place.namespace;
    ensure!(namespace.rules()?.is_empty(), "there are rules: {:?}", namespace.rules()?);
    let tools = ["iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"];
    for tool in tools {
        for arguments in ["-N KUBE-SERVICES", "-A KUBE-SERVICES -j RETURN", "-A PREROUTING -j KUBE-SERVICES"] {
            let arguments: Vec<&str> = ["-w", "-t", "nat"].into_iter().chain(arguments.split(' ')).collect();
            namespace.output(tool, &arguments)?;
        }
    }
    namespace.nft("add table inet own; add chain inet own c; add rule inet own c accept")?;
    let rules = namespace.rules()?;
    ensure!(rules.len() == 2 * tools.len() + 1, "{rules:#?}");
    namespace.flush_rules()?;
    ensure!(namespace.rules()?.is_empty(), "left: {:?}", namespace.rules()?);
    for tool in tools {
        let left = namespace.output(&format!("{tool}-save"), &["-t", "nat"])?;
        ensure!(!left.contains("KUBE"), "{tool}: {left}");
    }
    Ok(())
}

fn check(world: &World, from: &Place, to: &Place) -> Result<()> {
    for family in Family::BOTH {
        for transport in Transport::ALL {
            // Twice: a large datagram may be what tells the sender of a smaller MTU on the way.
            let ask = Ask::new(to.at(family, 8080), transport).times(2).timeout(500);
            let report = world.ask(from, &ask.with("--size=9000").with("--reply=9000"))?;
            let seen = report.tries.last().context("no try")?;
            let what = format!("{} -> {} {family} {transport}", from.name, to.name);
            let answer = seen.answer.as_ref().with_context(|| format!("{what}: {:?}", seen.error))?;
            ensure!(answer.backend == to.name, "{what}: answered by {}", answer.backend);
            // The node itself is multi-homed where pods sit on a bridge: it picks its address by the route. Flannel
            // masquerades what leaves the pod network.
            let masqueraded = world.topology == Topology::Vxlan && to.is_node() && from.node != to.node;
            if !from.is_node() && (!masqueraded || from.node.is_none()) {
                let expected = from.ip(family).to_string();
                ensure!(answer.peer.contains(&expected), "{what}: came from {}", answer.peer);
            }
        }
    }
    Ok(())
}

fn everybody(world: &World) -> Result<()> {
    let (a1, b1, c2) = (world.pod("a1"), world.pod("b1"), world.pod("c2"));
    let (node1, node2) = (&world.node(1).place, &world.node(2).place);
    for (from, to) in [(a1, b1), (a1, c2), (c2, a1), (node1, a1), (node1, c2), (node1, node2), (a1, node2), (a1, node1)]
    {
        check(world, from, to)?;
    }
    ensure!(world.leaks()?.is_empty(), "packets for Services in the sink");
    Ok(())
}

fn outside(world: &World) -> Result<()> {
    let outside = world.outside();
    check(world, outside, &world.node(1).place)?;
    check(world, outside, &world.node(2).place)?;
    for family in Family::BOTH {
        let report = world.ask(outside, &Ask::new(world.pod("a1").at(family, 8080), Transport::Tcp).timeout(300))?;
        ensure!(report.errors().contains_key("ENETUNREACH"), "outside -> a1 {family}: {report:?}");
    }
    Ok(())
}

fn leaks_are_seen(world: &World) -> Result<()> {
    for family in Family::BOTH {
        for from in [world.pod("a1"), &world.node(1).place, world.outside()] {
            let to = std::net::SocketAddr::new(vip(family, 99), 80);
            let report = world.ask(from, &Ask::new(to, Transport::Tcp).timeout(200))?;
            ensure!(report.backends().is_empty(), "{} reached {to}", from.name);
            let leaks = world.leaks()?;
            ensure!(
                leaks.iter().any(|leak| leak.contains(&to.ip().to_string())),
                "{} -> {to}: sink saw {leaks:?}",
                from.name
            );
        }
    }
    ensure!(world.leaks()?.is_empty(), "leaks are counted once");
    Ok(())
}

/// What is left of a world of this id.
fn remains(id: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for dir in ["/run/netns", "/run/proxy-world", "/sys/fs/bpf", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        for entry in std::fs::read_dir(dir).into_iter().flatten() {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().contains(id)) {
                found.push(path.display().to_string());
            }
        }
    }
    Ok(found)
}

fn small() -> Result<World> {
    let spec = Spec { nodes: vec![vec!["a1".to_owned()]], ..Spec::two_nodes(Topology::Routed) };
    World::new(&spec, Programs { testpod: Programs::find_testpod()?, agent: "".into() })
}

fn dropped_world_leaves_nothing() -> Result<()> {
    let world = small()?;
    let id = world.id().to_owned();
    ensure!(remains(&id)?.len() >= 6, "a living world is somewhere: {:?}", remains(&id)?);
    drop(world);
    ensure!(remains(&id)?.is_empty(), "left: {:?}", remains(&id)?);
    // Two at once do not meet.
    let (one, two) = (small()?, small()?);
    check(&one, &one.node(1).place, one.pod("a1"))?;
    check(&two, &two.node(1).place, two.pod("a1"))
}

/// Makes a world, says its id, waits to be killed.
fn child() -> ExitCode {
    let made = proxy_tests::world::cleanup_on_signals().and_then(|()| small());
    match made {
        Ok(world) => {
            println!("{}", world.id());
            std::thread::sleep(Duration::from_secs(60));
            drop(world);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A world made by a child that then gets `signal`: its id.
fn orphan(signal: &str) -> Result<String> {
    let mut child =
        Command::new(std::env::current_exe()?).env(CHILD, "1").stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut id = String::new();
    BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut id)?;
    let id = id.trim().to_owned();
    ensure!(!id.is_empty(), "the child made no world");
    ensure!(!remains(&id)?.is_empty(), "the child's world is nowhere");
    Command::new("kill").args([signal, &child.id().to_string()]).status()?;
    child.wait()?;
    Ok(id)
}

fn killed_owner_is_swept() -> Result<()> {
    let id = orphan("-KILL")?;
    ensure!(remains(&id)?.iter().any(|path| Path::new(path).starts_with("/run/netns")), "nothing to sweep");
    // Or another program did, which begins at this moment.
    World::sweep()?;
    ensure!(remains(&id)?.is_empty(), "left: {:?}", remains(&id)?);
    Ok(())
}

fn sigint_removes_the_world() -> Result<()> {
    let id = orphan("-INT")?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while !remains(&id)?.is_empty() {
        if Instant::now() > deadline {
            bail!("left: {:?}", remains(&id)?);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
