//! Rulesets of kube-proxy's shape for one Service port of interest among many: what its nftables and iptables modes make
//! the kernel walk through. Two endpoints for each Service; those of the one that is measured are both the server.

use std::{fmt::Write as _, net::Ipv4Addr};

use anyhow::Result;

use crate::world::{Netns, SERVER};

pub const PORT: u16 = 80;
pub const SERVER_PORT: u16 = 8080;

/// VIP of the `index`-th Service.
pub fn vip(index: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 0)) + 1 + index)
}

/// The Service that is measured: in the middle of the rules.
pub fn measured(services: u32) -> u32 {
    services / 2
}

fn endpoints(index: u32, services: u32) -> [String; 2] {
    if index == measured(services) {
        return [format!("{SERVER}:{SERVER_PORT}"), format!("{SERVER}:{SERVER_PORT}")];
    }
    [0, 1].map(|n| format!("{}:{SERVER_PORT}", Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 3, 0, 0)) + 2 * index + n)))
}

pub fn nft(node: &Netns, services: u32) -> Result<()> {
    let mut text = String::from(
        "table ip kube-proxy {
  set cluster-ips { type ipv4_addr; }
  map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
  map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
  chain mark-for-masquerade { mark set mark or 0x4000; }
  chain masquerading { mark and 0x4000 == 0 return; mark set mark xor 0x4000; masquerade fully-random; }
  chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
  chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
  chain cluster-ips-check { ip daddr @cluster-ips reject; ip daddr 10.96.0.0/12 drop; }
  chain filter-input { type filter hook input priority 0; ct state new jump service-endpoints-check; }
  chain filter-forward { type filter hook forward priority 0; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
  chain filter-output { type filter hook output priority 0; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
  chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
  chain nat-output { type nat hook output priority -100; jump services; }
  chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
",
    );
    let mut elements = String::new();
    let mut ips = String::new();
    for index in 0..services {
        let vip = vip(index);
        let endpoints = endpoints(index, services);
        for (n, endpoint) in endpoints.iter().enumerate() {
            let (ip, _) = endpoint.split_once(':').unwrap_or_default();
            writeln!(
                text,
                "  chain endpoint-{index}-{n} {{ ip saddr {ip} jump mark-for-masquerade; meta l4proto tcp dnat to {endpoint}; }}"
            )?;
        }
        writeln!(
            text,
            "  chain service-{index} {{ ip daddr {vip} tcp dport {PORT} ip saddr != 10.1.0.0/16 jump mark-for-masquerade; \
             numgen random mod 2 vmap {{ 0: goto endpoint-{index}-0, 1: goto endpoint-{index}-1 }}; }}"
        )?;
        write!(elements, "{vip} . tcp . {PORT} : goto service-{index},")?;
        write!(ips, "{vip},")?;
    }
    text.push_str("}\n");
    writeln!(text, "add element ip kube-proxy cluster-ips {{ {ips} }}")?;
    writeln!(text, "add element ip kube-proxy service-ips {{ {elements} }}")?;
    node.run("nft", &["-f", "-"], &text)
}

/// `iptables-legacy-restore` where there is one, else whatever `iptables-restore` is.
pub fn iptables_restore() -> &'static str {
    let there =
        |name: &str| ["/usr/sbin", "/sbin", "/usr/bin"].iter().any(|d| std::path::Path::new(d).join(name).exists());
    if there("iptables-legacy-restore") { "iptables-legacy-restore" } else { "iptables-restore" }
}

pub fn iptables(node: &Netns, services: u32) -> Result<()> {
    let mut chains = String::new();
    let mut rules = String::new();
    for index in 0..services {
        let vip = vip(index);
        writeln!(chains, ":KUBE-SVC-{index:08} - [0:0]\n:KUBE-SEP-{index:08}A - [0:0]\n:KUBE-SEP-{index:08}B - [0:0]")?;
        writeln!(rules, "-A KUBE-SERVICES -d {vip}/32 -p tcp -m tcp --dport {PORT} -j KUBE-SVC-{index:08}")?;
        writeln!(
            rules,
            "-A KUBE-SVC-{index:08} ! -s 10.1.0.0/16 -d {vip}/32 -p tcp -m tcp --dport {PORT} -j KUBE-MARK-MASQ"
        )?;
        writeln!(
            rules,
            "-A KUBE-SVC-{index:08} -m statistic --mode random --probability 0.5 -j KUBE-SEP-{index:08}A\n\
             -A KUBE-SVC-{index:08} -j KUBE-SEP-{index:08}B"
        )?;
        for (name, endpoint) in ["A", "B"].iter().zip(endpoints(index, services)) {
            let (ip, _) = endpoint.split_once(':').unwrap_or_default();
            writeln!(
                rules,
                "-A KUBE-SEP-{index:08}{name} -s {ip}/32 -j KUBE-MARK-MASQ\n\
                 -A KUBE-SEP-{index:08}{name} -p tcp -m tcp -j DNAT --to-destination {endpoint}"
            )?;
        }
    }
    let text = format!(
        "*filter
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
{chains}-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
{rules}COMMIT
"
    );
    node.run(iptables_restore(), &[], &text)
}
