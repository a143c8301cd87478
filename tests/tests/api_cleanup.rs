//! What the real kube-proxy leaves, and `cleanup --kube-proxy`: nothing of it is left then, and nothing else is gone.

use std::{path::Path, process::ExitCode};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    apiserver,
    conformance::{
        lab::{Lab, Means},
        services::{self, FIRST, SERVICES},
        subject::{self, Mode, Subject},
        table::Configuration,
    },
    suite::Suite,
    world::{World, cleanup_on_signals},
};

/// Somebody's, in every table that kube-proxy writes to, of both families; names of the kubelet's and of kube-router's among them.
const OTHERS: &str = "*nat\n:KUBE-ROUTER-SNAT - [0:0]\n-A POSTROUTING -j KUBE-ROUTER-SNAT\n-A POSTROUTING -m comment --comment \"-j KUBE-SERVICES\" -j ACCEPT\nCOMMIT\n\
    *filter\n:KUBE-FIREWALL - [0:0]\n:MINE - [0:0]\n-A FORWARD -p tcp -m tcp --dport 7 -j MINE\n-A MINE -j RETURN\nCOMMIT\n\
    *mangle\n:KUBE-KUBELET-CANARY - [0:0]\n-A PREROUTING -p udp -m udp --dport 9 -j ACCEPT\nCOMMIT\n";

fn main() -> ExitCode {
    let mut suite = Suite::new("api_cleanup");
    let Some(programs) = suite.programs() else { return suite.finish() };
    let (servers, kube_proxy) =
        match apiserver::Programs::find().and_then(|servers| Ok((servers, subject::kube_proxy()?))) {
            Ok(found) => found,
            Err(reason) => {
                suite.skip("api_cleanup", &format!("{reason:#}"));
                return suite.finish();
            }
        };
    let prepared = cleanup_on_signals()
        .and_then(|()| World::sweep())
        .and_then(|_| Lab::new(programs, Means::Upstream { servers, kube_proxy: kube_proxy.clone() }))
        .and_then(|lab| {
            lab.install(&services::parse(SERVICES, FIRST)?)?;
            Ok(lab)
        });
    match prepared {
        Ok(mut lab) => {
            for mode in [Mode::Nftables, Mode::Iptables] {
                let subject = Subject::KubeProxy(mode);
                suite.case(&format!("cleanup --kube-proxy after {}", subject.name()), || {
                    cleans_up(&mut lab, mode, &kube_proxy)
                });
            }
        }
        Err(error) => suite.fail("preparation", &error),
    }
    suite.finish()
}

fn rules(lab: &Lab) -> Result<String> {
    lab.world.node(1).place.namespace.output("nft", &["-s", "list", "ruleset"])
}

fn cleans_up(lab: &mut Lab, mode: Mode, kube_proxy: &Path) -> Result<()> {
    let namespace = lab.world.node(1).place.namespace.clone();
    for program in ["iptables-nft-restore", "ip6tables-nft-restore"] {
        let file = lab.world.objects_dir().join("others.rules");
        std::fs::write(&file, OTHERS)?;
        namespace.output(program, &["--noflush", file.to_str().context("a path")?])?;
    }
    let before = rules(lab)?;
    lab.start(Subject::KubeProxy(mode), Configuration::BASE)?;
    lab.end_proxies();
    let left = rules(lab)?;
    let named = lab.world.cli_output(lab.world.node(1), &["check"])?;
    ensure!(named.contains("kube-proxy in "), "check does not name kube-proxy:\n{named}");

    let dry = lab.world.cli(lab.world.node(1), &["cleanup", "--kube-proxy", "--dry-run"])?;
    ensure!(dry.contains("would remove") && rules(lab)? == left, "a dry run: {dry}");
    let said = lab.world.cli(lab.world.node(1), &["cleanup", "--kube-proxy"])?;
    ensure!(said.replace("removed", "would remove") == dry, "said before:\n{dry}\ndone:\n{said}");
    let after = rules(lab)?;
    // kube-proxy makes the kubelet's chain, too, and itself leaves it behind.
    let lines = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !line.contains("KUBE-FIREWALL")).map(str::to_owned).collect()
    };
    if mode == Mode::Nftables {
        ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    } else {
        let (before, after) = (lines(&before), lines(&after));
        let gone: Vec<&String> = before.iter().filter(|line| !after.contains(line)).collect();
        ensure!(gone.is_empty(), "what was somebody else's is gone: {gone:?}");
        let of_others = ["KUBE-ROUTER-SNAT", "KUBE-KUBELET-CANARY", "-j KUBE-SERVICES"];
        let rest: Vec<&String> = after
            .iter()
            .filter(|line| line.contains("KUBE-") && !of_others.iter().any(|name| line.contains(name)))
            .collect();
        ensure!(rest.is_empty(), "still there: {rest:?}");
    }
    // Its own cleanup finds nothing that we left.
    let done =
        lab.world.node(1).place.command(kube_proxy)?.args(["--cleanup", "--v=0"]).env_remove("KUBECONFIG").output()?;
    let again = rules(lab)?;
    ensure!(again == after, "kube-proxy --cleanup ({}) found more:\n{after}\nthen:\n{again}", done.status);
    let said = lab.world.cli(lab.world.node(1), &["cleanup", "--kube-proxy"])?;
    ensure!(said.contains("no rules of kube-proxy"), "{said}");
    lab.stop()
}
