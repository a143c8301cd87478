//! The table: who asks what, and what has to come back.

use anyhow::{Context, Result, bail};

use super::services::{Service, Via};
use crate::{pod::socket::Transport, world::Family};

/// The 30 flows of A77 in the contract's own notation: `A` all endpoints, `L` local ones only, `m` masqueraded; endpoints are one on
/// the node that is asked, one on the other. `-` is no flow: a loopback's address has no other way to a Service than NodePorts.
pub struct Matrix {
    pub configuration: Configuration,
    pub number: &'static str,
    pub rows: &'static str,
}

/// What the dataplane is told, beyond its objects.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Configuration {
    /// Whether it is told which sources are pods of its own node.
    pub detector: bool,
    pub masquerade_all: bool,
}

impl Configuration {
    pub const BASE: Self = Self { detector: true, masquerade_all: false };

    pub fn name(self) -> &'static str {
        match (self.detector, self.masquerade_all) {
            (true, false) => "",
            (false, false) => ", no detector",
            (true, true) => ", masquerade all",
            (false, true) => ", no detector, masquerade all",
        }
    }
}

pub const MATRICES: [Matrix; 4] = [
    Matrix {
        configuration: Configuration::BASE,
        number: "A77",
        rows: "
            |           | CIP | CIP eTP | CIP iTP | NP  | NP eTP | NP iTP | LB  | LB eTP | LB iTP |
            | pod       | A   | A       | L       | A m | A      | A m    | A m | A      | A m    |
            | node      | A m | A m     | L m     | A m | A m    | A m    | A m | A m    | A m    |
            | localhost | -   | -       | -       | A m | A m    | A m    | -   | -      | -      |
            | outside   | A m | A m     | L m     | A m | L      | A m    | A m | L      | A m    |",
    },
    Matrix {
        configuration: Configuration { detector: false, masquerade_all: false },
        number: "A78",
        rows: "
            |           | CIP | CIP eTP | CIP iTP | NP  | NP eTP | NP iTP | LB  | LB eTP | LB iTP |
            | pod       | A   | A       | L       | A m | L      | A m    | A m | L      | A m    |
            | node      | A   | A       | L       | A m | A m    | A m    | A m | A m    | A m    |
            | localhost | -   | -       | -       | A m | A m    | A m    | -   | -      | -      |
            | outside   | A   | A       | L       | A m | L      | A m    | A m | L      | A m    |",
    },
    Matrix {
        configuration: Configuration { detector: true, masquerade_all: true },
        number: "A79",
        rows: "
            |           | CIP | CIP eTP | CIP iTP | NP  | NP eTP | NP iTP | LB  | LB eTP | LB iTP |
            | pod       | A m | A m     | L m     | A m | A      | A m    | A m | A      | A m    |
            | node      | A m | A m     | L m     | A m | A m    | A m    | A m | A m    | A m    |
            | localhost | -   | -       | -       | A m | A m    | A m    | -   | -      | -      |
            | outside   | A m | A m     | L m     | A m | L      | A m    | A m | L      | A m    |",
    },
    Matrix {
        configuration: Configuration { detector: false, masquerade_all: true },
        number: "A80",
        rows: "
            |           | CIP | CIP eTP | CIP iTP | NP  | NP eTP | NP iTP | LB  | LB eTP | LB iTP |
            | pod       | A m | A m     | L m     | A m | L      | A m    | A m | L      | A m    |
            | node      | A m | A m     | L m     | A m | A m    | A m    | A m | A m    | A m    |
            | localhost | -   | -       | -       | A m | A m    | A m    | -   | -      | -      |
            | outside   | A m | A m     | L m     | A m | L      | A m    | A m | L      | A m    |",
    },
];

/// `numbers | who asks | Service and way | what comes back | limits`.
///
/// Who: `pod` (on node1), `node` (node1), `localhost` (node1, over its loopback), `outside`, `other` (a pod of node2), or a place
/// by its name. What: the backends that answer and whose source they see (`own`: the asker's; `node`: a node's, as masquerading
/// leaves it), `refused`, `silent`, `nobody` (either of them). `b1|b2`: always the same one of them; `b2:9090`: by another port than 8080.
/// Limits: `v4`, `v6`, `tcp`, `udp`; `sctp` and `ping`, instead of these (`echo` answers a ping, whoever that is); `large`: datagrams that take
/// several fragments, there and back.
pub const CASES: &str = "
    A1 A49   | pod       | foreign cluster-ip           | silent        |
    A1       | outside   | foreign node-port            | refused       |
    A2       | pod       | headless-slices cluster-ip   | refused       |
    A7       | pod       | one-number cluster-ip        | b1 b2 own     | tcp
    A7       | pod       | one-number cluster-ip        | b1:9090 b2:9090 own | udp
    A7       | outside   | one-number node-port         | b1 b2 node    | tcp
    A7       | outside   | one-number node-port         | b1:9090 b2:9090 node | udp
    A8       | pod       | only-v4 cluster-ip           | b1 b2 own     | v4
    A8 A9    | outside   | only-v4 lb                   | b1 b2 node    | v4
    A8 A9    | outside   | only-v4 external-ip          | b1 b2 node    | v4
    A8       | pod       | only-v6 cluster-ip           | b1 b2 own     | v6
    A8 A9    | outside   | only-v6 lb                   | b1 b2 node    | v6
    A8 A9    | outside   | only-v6 external-ip          | b1 b2 node    | v6
    A8 A56   | outside   | only-v4 node-port            | refused       | v6
    A10 A91  | outside   | ranged-blank lb              | b1 b2 node    |
    A10 A91  | pod       | ranged-blank lb              | silent        |
    A11      | pod       | proxied lb                   | silent        |
    A11      | node      | proxied lb                   | silent        |
    A11      | outside   | proxied lb                   | silent        |
    A11      | outside   | proxied node-port            | b1 b2 node    |
    A15 A46  | pod       | plain cluster-ip             | b1 b2 own     |
    A15 A51  | node      | plain cluster-ip             | b1 b2 node    |
    A15 A51  | outside   | plain cluster-ip             | b1 b2 node    |
    A17 A18 A21 A22 | pod | odd-slices cluster-ip       | b1 b2 own     |
    A17 A18 A21 A22 | outside | odd-slices node-port    | b1 b2 node    |
    A19 A20  | pod       | doubled cluster-ip           | b1 b2 own     |
    A19 A20  | outside   | doubled node-port            | b1 b2 node    |
    A23      | pod       | numbers cluster-ip           | b1 b2:9090 own |
    A23      | outside   | numbers node-port            | b1 b2:9090 node |
    A24 A40  | pod       | bare cluster-ip              | b1 b2 own     |
    A16 A32  | pod       | one-ready cluster-ip         | b1 own        |
    A16 A32  | outside   | one-ready node-port          | b1 node       |
    A32 A35  | pod       | terminating cluster-ip       | c1 own        |
    A32 A35  | outside   | terminating lb               | c1 node       |
    A33 A42  | outside   | local-terminating node-port  | b1 own        |
    A33      | outside   | local-terminating lb         | b1 own        |
    A33 A42 A66 | pod    | local-terminating lb         | b2 own        |
    A33      | pod       | local-terminating cluster-ip | b2 own        |
    A35 A81  | pod       | unready cluster-ip           | refused       |
    A35 A81  | outside   | unready lb                   | refused       |
    A26 A36  | pod       | nodes cluster-ip             | b1 own        |
    A36      | other     | nodes cluster-ip             | b2 own        |
    A36      | outside   | nodes node-port              | b1 node       |
    A26 A37  | pod       | zones cluster-ip             | b1 own        |
    A37      | other     | zones cluster-ip             | b2 own        |
    A37      | outside   | zones lb                     | b1 node       |
    A38      | pod       | half-hinted cluster-ip       | b1 b2 own     |
    A39      | pod       | zone-local cluster-ip        | b1 own        |
    A47 A48  | pod       | lb cluster-ip:53             | refused       | tcp
    A47 A48  | pod       | lb cluster-ip:80             | refused       | udp
    A48      | pod       | lb cluster-ip:999            | refused       |
    A48      | node      | lb cluster-ip:999            | refused       |
    A48      | outside   | lb cluster-ip:999            | refused       |
    A50      | pod       | lb cluster-ip                | nobody        | ping
    A50      | node      | lb cluster-ip                | nobody        | ping
    A50      | outside   | lb cluster-ip                | nobody        | ping
    A50      | outside   | lb lb                        | nobody        | ping
    A50      | outside   | lb node-port                 | echo own      | ping
    A51      | other     | lb cluster-ip                | b1 b2 own     |
    A51      | node2     | lb cluster-ip                | b1 b2 node    |
    A51 A71  | pod       | host cluster-ip              | node1 node2 own |
    A51      | node      | host cluster-ip              | node1 node2 node |
    A51 A63  | outside   | host cluster-ip              | node1 node2 node+own |
    A52      | outside   | lb node-port@node2           | b1 b2 node    |
    A52      | pod       | lb node-port@node2           | b1 b2 node    |
    A52      | outside   | lb node-port@second          | b1 b2 node    |
    A52      | pod       | lb node-port@second          | b1 b2 node    |
    A52      | outside   | owned node-port@lb           | b1 b2 node    |
    A52      | outside   | owned lb                     | b1 b2 node    |
    A52      | outside   | ports node-port              | b1 b2 node    |
    A52      | node      | ports node-port              | b1 b2 node    |
    A54      | localhost | lb node-port@localhost       | b1 b2 node    | v4
    A54      | localhost | lb node-port@localhost       | refused       | v6
    A54 A56  | localhost | empty node-port@localhost    | refused       |
    A56 A81  | outside   | empty node-port@second       | refused       |
    A57      | pod       | lb external-ip               | b1 b2 node    |
    A57      | node      | lb external-ip               | b1 b2 node    |
    A57      | outside   | lb external-ip               | b1 b2 node    |
    A57      | other     | lb external-ip               | b1 b2 node    |
    A57 A65  | outside   | ext-local external-ip        | b1 own        |
    A57 A66  | pod       | ext-local external-ip        | b1 b2 own     |
    A57 A67  | node      | ext-local external-ip        | b1 b2 node    |
    A58      | other     | lb lb                        | b1 b2 node    |
    A58 A66  | other     | ext-local lb                 | b1 b2 own     |
    A59      | outside   | no-node-ports lb             | b1 b2 node    |
    A59      | pod       | no-node-ports lb             | b1 b2 node    |
    A60      | outside   | pending node-port            | b1 b2 node    |
    A60      | pod       | pending cluster-ip           | b1 b2 own     |
    A61      | pod       | sctp cluster-ip              | b1 b2 own     | sctp
    A61      | pod       | sctp node-port               | b1 b2 node    | sctp
    A61      | pod       | sctp lb                      | b1 b2 node    | sctp
    A61      | other     | sctp cluster-ip              | b1 b2 own     | sctp
    A61      | other     | sctp node-port               | b1 b2 node    | sctp
    A61      | other     | sctp lb                      | b1 b2 node    | sctp
    A61      | outside   | sctp cluster-ip              | b1 b2 node    | sctp
    A61      | outside   | sctp node-port               | b1 b2 node    | sctp
    A61      | outside   | sctp lb                      | b1 b2 node    | sctp
    A61      | node      | sctp cluster-ip              | b1 b2 node    | sctp
    A61      | node      | sctp lb                      | b1 b2 node    | sctp
    A62      | pod       | lb cluster-ip                | b1 b2 own     | large
    A62      | node      | lb cluster-ip                | b1 b2 node    | large
    A62      | outside   | lb node-port                 | b1 b2 node    | large
    A62      | outside   | lb lb                        | b1 b2 node    | large
    A64      | other     | lb node-port                 | b1 b2 node    |
    A64      | outside   | one-ready lb                 | b1 node       |
    A65      | outside   | ext-local node-port@node2    | b2 own        |
    A69      | other     | ext-local node-port          | b1 own        |
    A70      | pod       | self cluster-ip              | a1 node       |
    A70      | pod       | self node-port               | a1 node       |
    A70      | pod       | self lb                      | a1 node       |
    A70      | pod       | self external-ip             | a1 node       |
    A70      | b1        | lb cluster-ip                | b1 b2 node+own |
    A25 A71  | other     | int-local cluster-ip         | b2 own        |
    A81 A82 A88 | pod    | empty cluster-ip             | refused       |
    A81 A82  | node      | empty cluster-ip             | refused       |
    A81      | outside   | empty cluster-ip             | refused       |
    A81      | pod       | empty node-port              | refused       |
    A81      | node      | empty node-port              | refused       |
    A81      | outside   | empty node-port              | refused       |
    A81      | other     | empty node-port              | refused       |
    A81      | pod       | empty lb                     | refused       |
    A81      | node      | empty lb                     | refused       |
    A81      | outside   | empty lb                     | refused       |
    A81      | pod       | empty external-ip            | refused       |
    A81      | node      | empty external-ip            | refused       |
    A81      | outside   | empty external-ip            | refused       |
    A34 A83  | pod       | far-int cluster-ip           | silent        |
    A83      | node      | far-int cluster-ip           | silent        |
    A83      | outside   | far-int cluster-ip           | silent        |
    A83      | other     | far-int cluster-ip           | b2 own        |
    A43 A83  | outside   | far-int node-port            | b2 node       |
    A83      | outside   | far-int lb                   | b2 node       |
    A31 A34 A84 | outside | far-ext node-port           | silent        |
    A31 A84 A85 | outside | far-ext lb                  | silent        |
    A31 A84  | outside   | far-ext external-ip          | silent        |
    A84 A69  | other     | far-ext node-port            | silent        |
    A84 A66  | pod       | far-ext node-port            | b2 own        |
    A84 A66  | pod       | far-ext lb                   | b2 own        |
    A84 A67  | node      | far-ext lb                   | b2 node       |
    A84 A67  | node      | far-ext node-port            | b2 node       |
    A43 A84  | pod       | far-ext cluster-ip           | b2 own        |
    A31 A84  | outside   | far-ext cluster-ip           | b2 node       |
    A34 A86  | pod       | empty-int cluster-ip         | refused       |
    A86      | outside   | empty-int cluster-ip         | refused       |
    A34 A86  | outside   | empty-ext node-port          | refused       |
    A86      | outside   | empty-ext lb                 | refused       |
    A86      | outside   | empty-ext external-ip        | refused       |
    A86      | pod       | empty-ext lb                 | refused       |
    A86      | node      | empty-ext lb                 | refused       |
    A89      | outside   | ranged-empty lb              | silent        |
    A89 A81  | outside   | ranged-empty node-port       | refused       |
    A90      | outside   | ranged-out node-port         | b1 b2 node    |
    A90      | outside   | ranged-out external-ip       | b1 b2 node    |
    A90      | pod       | ranged-out node-port         | b1 b2 node    |
    A90      | pod       | ranged-out cluster-ip        | b1 b2 own     |
    A91      | outside   | ranged lb                    | b1 b2 node    |
    A91      | pod       | ranged lb                    | silent        |
    A91      | node      | ranged lb                    | silent        |
    A91      | other     | ranged lb                    | silent        |
    A91      | outside   | ranged-out lb                | silent        |
    A91      | pod       | ranged-out lb                | silent        |
    A91      | node      | ranged-out lb                | silent        |
    A91      | outside   | ranged-local lb              | b1 own        |
    A91      | pod       | ranged-local lb              | silent        |
    A91 A92  | node      | ranged-nodes lb              | b1 b2 node    |
    A91      | pod       | ranged-nodes lb              | silent        |
    A91      | outside   | ranged-nodes lb              | b1 b2 node    |
    A93      | outside   | ranged-v4 lb                 | silent        | v4
    A93      | outside   | ranged-v4 lb                 | b1 b2 node    | v6
    A93      | pod       | ranged-all lb                | b1 b2 node    |
    A93      | outside   | ranged-all lb                | b1 b2 node    |
    A95      | pod       | sticky cluster-ip            | b1|b2 own     |
    A95      | node      | sticky cluster-ip            | b1|b2 node    |
    A95 A100 | outside   | sticky node-port             | b1|b2 node    |
    A100     | outside   | sticky-local lb              | b1|c1 own     |
";

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub from: String,
    pub service: String,
    pub via: Via,
    pub expected: Expected,
    pub families: Vec<Family>,
    pub transports: Vec<Transport>,
    /// Bytes, of a question and of its answer.
    pub size: usize,
}

/// Of a question that says nothing of it.
pub const SIZE: usize = 16;
/// Several fragments, on any link.
const LARGE: usize = 8_000;

/// What has to come back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expected {
    Refused,
    Silent,
    /// Refused or not, nobody answers.
    Nobody,
    Answered {
        backends: Vec<String>,
        /// One and the same of them.
        sticky: bool,
        source: String,
    },
}

impl Expected {
    pub fn parse(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        Ok(match words[..] {
            ["refused"] => Self::Refused,
            ["silent"] => Self::Silent,
            ["nobody"] => Self::Nobody,
            [one, source] if one.contains('|') => Self::Answered {
                backends: one.split('|').map(str::to_owned).collect(),
                sticky: true,
                source: source.to_owned(),
            },
            [ref backends @ .., source] if !backends.is_empty() => Self::Answered {
                backends: backends.iter().map(|&backend| backend.to_owned()).collect(),
                sticky: false,
                source: source.to_owned(),
            },
            _ => bail!("{text:?} is no answer"),
        })
    }

    /// In the notation of the table.
    pub fn text(&self) -> String {
        match self {
            Self::Refused => "refused".to_owned(),
            Self::Silent => "silent".to_owned(),
            Self::Nobody => "nobody".to_owned(),
            Self::Answered { backends, sticky, source } => {
                format!("{} {source}", backends.join(if *sticky { "|" } else { " " }))
            }
        }
    }
}

/// The lines of [`CASES`].
pub fn cases(services: &[Service]) -> Result<Vec<Case>> {
    let lines = CASES.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(|line| case(line, services).with_context(|| line.to_owned())).collect()
}

fn case(line: &str, services: &[Service]) -> Result<Case> {
    // `|` within an answer has no blanks round it.
    let cells: Vec<&str> = line.trim_end_matches('|').split(" | ").map(str::trim).collect();
    let (numbers, from, what, answer, limits) = match cells[..] {
        [numbers, from, what, answer] => (numbers, from, what, answer, ""),
        [numbers, from, what, answer, limits] => (numbers, from, what, answer, limits),
        _ => bail!("not five cells"),
    };
    let (service, via) = what.split_once(' ').context("a Service and a way to it")?;
    let service = services.iter().find(|known| known.name == service).context("no such Service")?;
    let via = Via::parse(via.trim())?;
    let mut families = match via {
        // What a Service has no address of is not asked; a node port of a family it lacks may be.
        Via::NodePort(_) => Family::BOTH.to_vec(),
        _ => service.families.clone(),
    };
    let mut transports = vec![Transport::Tcp, Transport::Udp];
    let mut size = SIZE;
    for limit in limits.split_whitespace() {
        match limit {
            "v4" => families.retain(|&family| family == Family::V4),
            "v6" => families.retain(|&family| family == Family::V6),
            "tcp" => transports.retain(|&transport| transport == Transport::Tcp),
            "udp" => transports.retain(|&transport| transport != Transport::Tcp),
            "sctp" => transports = vec![Transport::Sctp],
            "ping" => transports = vec![Transport::Ping],
            "large" => (transports, size) = (vec![Transport::Udp], LARGE),
            _ => bail!("no limit is called {limit}"),
        }
    }
    let limits = if limits.is_empty() { String::new() } else { format!(", {limits}") };
    Ok(Case {
        name: format!("{numbers}: {from} to {what}{limits}"),
        from: from.to_owned(),
        service: service.name.clone(),
        via,
        expected: Expected::parse(answer)?,
        families,
        transports,
        size,
    })
}

impl Matrix {
    pub fn cases(&self) -> Result<Vec<Case>> {
        let lines = self.rows.lines().map(str::trim).filter(|line| !line.is_empty());
        let mut rows = lines.map(|line| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>());
        let header = rows.next().context("no header")?;
        let mut cases = Vec::new();
        for row in rows {
            let (from, cells) = row.split_first().context("an empty row")?;
            for (target, cell) in header.iter().skip(1).zip(cells) {
                if *cell != "-" {
                    cases.push(self.case(from, target, cell)?);
                }
            }
        }
        Ok(cases)
    }

    fn case(&self, from: &str, target: &str, cell: &str) -> Result<Case> {
        let (way, policy) = target.split_once(' ').unwrap_or((target, ""));
        let service = match policy {
            "" => "lb",
            "eTP" => "ext-local",
            "iTP" => "int-local",
            _ => bail!("no policy is called {policy}"),
        };
        let via = match (way, from) {
            ("CIP", _) => "cluster-ip",
            ("NP", "localhost") => "node-port@localhost",
            ("NP", _) => "node-port",
            ("LB", _) => "lb",
            _ => bail!("no way is called {way}"),
        };
        // The node has no other source than its own address, masqueraded or not.
        let masqueraded = cell.ends_with('m') || matches!(from, "node" | "localhost");
        let backends = if cell.starts_with('L') { "b1" } else { "b1 b2" };
        let expected = Expected::parse(&format!("{backends} {}", if masqueraded { "node" } else { "own" }))?;
        let families = if from == "localhost" { vec![Family::V4] } else { Family::BOTH.to_vec() };
        Ok(Case {
            name: format!("{}: {from} to {service} {via}{}", self.number, self.configuration.name()),
            from: from.to_owned(),
            service: service.to_owned(),
            via: Via::parse(via)?,
            expected,
            families,
            transports: vec![Transport::Tcp, Transport::Udp],
            size: SIZE,
        })
    }
}
