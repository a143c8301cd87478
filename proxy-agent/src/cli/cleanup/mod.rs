//! `cleanup`: removes everything of ours from the kernel, whichever dataplane made it, and on request what kube-proxy left. Idempotent.
//!
//! What cannot be removed is said at the end, and is no reason for anything else to stay. Beside an agent that runs it removes what kube-proxy
//! left and nothing else.

use std::{
    fmt, fs,
    io::{self, Write},
    iter,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::bail;
use clap::Args as ClapArgs;

use self::kube_proxy::Extent;
use super::{Exit, pins::PinsArgs};
use crate::{
    config::{self, Bind},
    dataplane::{
        DataplaneError,
        ebpf::{Drain, Ebpf, read},
        iptables::Iptables,
        ipvs::Ipvs,
        netfilter::{ip, lock::Lock, nat},
        nftables::Nftables,
    },
    model::Family,
};

mod agent;
pub(super) mod kube_proxy;

/// Between two looks at connections that are waited for.
const LOOK: Duration = Duration::from_secs(1);
/// Between two words about them.
const SAY: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    #[command(flatten)]
    pins: PinsArgs,
    /// Also remove what kube-proxy left: its tables of nftables, its chains in those of iptables, virtual servers, device and sets of its
    /// IPVS mode; while an agent runs, nothing but that
    #[arg(long)]
    kube_proxy: bool,
    /// Of eBPF mode: let open connections end first, for so long at most (30m). New ones are left to whoever else serves here at once
    #[arg(long, value_name = "DURATION", value_parser = config::period, conflicts_with = "kube_proxy")]
    drain: Option<Duration>,
    /// With --kube-proxy: also where connections may break by it, since the agent has not all in force, NAT cannot be kept on, or the firewall
    /// drops what kube-proxy's chain KUBE-FORWARD accepts
    #[arg(long, requires = "kube_proxy")]
    force: bool,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
}

impl Args {
    /// What kube-proxy's `--cleanup` is expected to do: ours, and kube-proxy's.
    pub fn everything(pins: PinsArgs) -> Self {
        Self { pins, kube_proxy: true, drain: None, force: false, dry_run: false }
    }
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args { pins: PinsArgs { bpffs, metrics_bind_address }, kube_proxy, drain, force, dry_run } = args;
    if let Some(agent) = agent::at_work(&bpffs) {
        if kube_proxy {
            let how = How { force, dry_run };
            return beside(&agent, &metrics_bind_address, how, out);
        }
        // It would put back at once what is removed under it.
        bail!("{agent}: stop it first");
    }
    if drain.is_some() && !dry_run {
        somebody_takes_over()?;
    }
    let (chains, unknown) = Iptables::remains();
    let rules = [
        Remains::of(Nftables::remains(), Nftables::remove),
        Remains { found: chains, unknown, remove: Iptables::remove },
        Remains::of(Ipvs::remains(), Ipvs::remove),
        Remains::of(Ipvs::left_by_trial(), Ipvs::remove_left_by_trial),
        Remains::of(nat::remains(), nat::remove),
    ];
    if !dry_run && rules.iter().any(|remains| !remains.found.is_empty()) {
        // Nothing goes where an agent is at work on some of them.
        drop(Lock::take()?);
    }
    let mut trouble = Vec::new();
    for remains in rules {
        trouble.extend(remains.go(dry_run, out)?);
    }
    trouble.extend(remove_pins(&bpffs, drain, dry_run, out)?);
    for dir in read::elsewhere(&bpffs) {
        writeln!(
            out,
            "{}: pins of an agent are here, too; `proxy-agent cleanup --bpffs {0}` removes them",
            dir.display()
        )?;
    }
    if kube_proxy
        && let Err(error) =
            kube_proxy::find(Extent::All).and_then(|found| of_kube_proxy(Extent::All, &found, dry_run, out))
    {
        trouble.push(format!("{error:#}"));
    }
    if trouble.is_empty() { Ok(Exit::Done) } else { bail!(trouble.join("; ")) }
}

/// What is left of one kind of rules.
struct Remains {
    /// By name.
    found: Vec<String>,
    /// Why there may be more.
    unknown: Option<DataplaneError>,
    /// Takes away all that there is.
    remove: fn() -> Result<(), DataplaneError>,
}

impl Remains {
    fn of(found: Result<Vec<String>, DataplaneError>, remove: fn() -> Result<(), DataplaneError>) -> Self {
        let (found, unknown) = match found {
            Ok(found) => (found, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        Self { found, unknown, remove }
    }

    /// Says what goes; what was in the way, each once.
    fn go(self, dry_run: bool, out: &mut dyn Write) -> io::Result<Vec<String>> {
        let Self { found, unknown, remove } = self;
        let unknown = unknown.map(|unknown| unknown.to_string());
        let removed = if dry_run || found.is_empty() { Ok(()) } else { remove().map_err(|error| error.to_string()) };
        match removed {
            // All that is known of is gone.
            Err(error) if unknown.as_ref() != Some(&error) => Ok(iter::once(error).chain(unknown).collect()),
            _ => {
                say(&found, dry_run, out)?;
                Ok(unknown.into_iter().collect())
            }
        }
    }
}

fn say(gone: impl IntoIterator<Item = impl fmt::Display>, dry_run: bool, out: &mut dyn Write) -> io::Result<()> {
    let done = if dry_run { "would remove" } else { "removed" };
    gone.into_iter().try_for_each(|gone| writeln!(out, "{done} {gone}"))
}

/// What was in the way.
fn remove_pins(bpffs: &Path, drain: Option<Duration>, dry_run: bool, out: &mut dyn Write) -> io::Result<Vec<String>> {
    let reading = |error: io::Error| vec![format!("reading {}: {error}", bpffs.display())];
    let found = match pinned(bpffs) {
        Ok(found) => found,
        Err(error) => return Ok(reading(error)),
    };
    if found.is_empty() {
        writeln!(out, "{}: nothing is pinned here", bpffs.display())?;
    }
    if dry_run {
        say(found.iter().map(|path| path.display()), dry_run, out)?;
        return Ok(Vec::new());
    }
    let removed = match drain {
        Some(patience) => drained(bpffs, patience, out),
        None => Ebpf::remove(bpffs).map_err(Into::into),
    };
    let mut trouble: Vec<String> = removed.err().map(|error| format!("{error:#}")).into_iter().collect();
    let left = match pinned(bpffs) {
        Ok(left) => left,
        Err(error) => return Ok(trouble.into_iter().chain(reading(error)).collect()),
    };
    say(found.iter().filter(|path| !left.contains(path)).map(|path| path.display()), dry_run, out)?;
    if let Some(path) = left.first() {
        let (left, found) = (left.len(), found.len());
        trouble.push(format!("{left} of {found} pins are still there, {} among them", path.display()));
    }
    Ok(trouble)
}

#[derive(Clone, Copy)]
struct How {
    force: bool,
    dry_run: bool,
}

impl How {
    /// Refuses what would break connections, unless it is asked for all the same.
    fn insist(self, trouble: &str, remedy: &str, out: &mut dyn Write) -> anyhow::Result<()> {
        if !self.force {
            bail!("{trouble}; {remedy}, or give --force");
        }
        writeln!(out, "{trouble}; goes on all the same (--force)")?;
        Ok(())
    }
}

/// What kube-proxy left, and nothing that the agent is at work on.
fn beside(agent: &str, asked: &Bind, how: How, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let agent::Asked { lack, accepts } = agent::ask(asked);
    if let Some(lack) = lack {
        how.insist(
            &format!("{agent}, but {lack}: without kube-proxy's rules nobody would serve what it does not"),
            "wait until `proxy-agent status` says that all is in force",
            out,
        )?;
    }
    writeln!(out, "{agent}: what is its own stays")?;
    let extent = if how.force || accepts { Extent::All } else { Extent::ButForwarding };
    let found = kube_proxy::find(extent)?;
    if !found.iter().all(kube_proxy::Remains::stays) {
        keep_nat(how, out)?;
    }
    of_kube_proxy(extent, &found, how.dry_run, out)?;
    Ok(Exit::Done)
}

/// Before kube-proxy's rules go, which may be the last that have translation switched on. The agent removes it when nobody needs it.
fn keep_nat(how: How, out: &mut dyn Write) -> anyhow::Result<()> {
    for family in Family::BOTH {
        // Where they cannot be counted there may be some.
        let count = match nat::translated(family) {
            Ok(0) => continue,
            Ok(count) => count.to_string(),
            Err(_) => "all".to_owned(),
        };
        let ip = ip(family);
        if how.dry_run {
            writeln!(out, "would keep NAT on for connections that are translated ({count}, {ip})")?;
            continue;
        }
        match nat::keep(family) {
            Ok(table) => writeln!(
                out,
                "made {table}: it keeps NAT on for connections that are translated ({count}), and the agent removes it when they have ended"
            )?,
            Err(error) => how.insist(
                &format!(
                    "NAT cannot be kept on for connections that are translated ({count}, {ip}), which would end with kube-proxy's rules: {error}"
                ),
                "see that the kernel has nftables with NAT (`modprobe nft_chain_nat`) and that nobody holds a table proxy-agent-nat \
                 (`nft list tables`), or wait until they have ended (`conntrack -L --dst-nat`)",
                out,
            )?,
        }
    }
    Ok(())
}

/// One that runs puts back what is taken from it; that shows at the end.
fn of_kube_proxy(
    extent: Extent,
    found: &[kube_proxy::Remains],
    dry_run: bool,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    if found.is_empty() {
        writeln!(out, "no rules of kube-proxy")?;
    }
    for remains in found {
        if remains.stays() {
            writeln!(
                out,
                "{} stays: FORWARD drops what no rule accepts there, and it accepts what is under way; let what goes to pods and comes from \
                 them through by rules of your own, and give --force",
                remains.what
            )?;
            continue;
        }
        if !dry_run {
            remains.remove()?;
        }
        say([&remains.what], dry_run, out)?;
    }
    if !dry_run && let Some(again) = kube_proxy::find(extent)?.iter().find(|remains| !remains.stays()) {
        bail!("{} is there again: does kube-proxy still run here?", again.what);
    }
    Ok(())
}

/// `--drain` is refused where nobody would take new connections.
fn somebody_takes_over() -> anyhow::Result<()> {
    if kube_proxy::find(Extent::ButForwarding)?.iter().all(kube_proxy::Remains::stays) {
        bail!(
            "there are no rules of kube-proxy here, so nobody would take new connections; start it, wait until \
             `curl http://127.0.0.1:10256/healthz` answers, and run this again, or end all connections by `proxy-agent cleanup` without --drain"
        );
    }
    Ok(())
}

/// Removes what is pinned once its connections have ended, by two looks: one may have begun just before new ones were left to others. Who
/// ends this before leaves them as they are, and may begin again.
fn drained(bpffs: &Path, patience: Duration, out: &mut dyn Write) -> anyhow::Result<()> {
    let Some(mut drain) = Drain::begin(bpffs)? else { return Ok(()) };
    writeln!(out, "new connections are left to others from now on")?;
    out.flush()?;
    let end = Instant::now() + patience;
    let mut said: Option<Instant> = None;
    let mut quiet = false;
    loop {
        let flows = drain.flows()?;
        let left = end.saturating_duration_since(Instant::now());
        if quiet && flows == 0 {
            writeln!(out, "all connections have ended")?;
            break;
        }
        if left.is_zero() {
            writeln!(out, "{flows} connections are open still, and end now")?;
            break;
        }
        quiet = flows == 0;
        if !quiet && said.is_none_or(|at| at.elapsed() >= SAY) {
            writeln!(out, "{flows} connections are open; {} s are left to them", left.as_secs())?;
            out.flush()?;
            said = Some(Instant::now());
        }
        thread::sleep(LOOK.min(left));
    }
    Ok(drain.remove()?)
}

/// Everything pinned below `dir`, sorted; nothing where there is no such directory.
fn pinned(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(pinned(&entry.path())?);
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_go_is_said_and_the_rest_goes() {
        let error = |text: &str| DataplaneError::Unavailable(text.into());
        let found = |name: &str| Ok(vec![name.to_owned()]);
        let rules = || {
            [
                Remains::of(found("table"), || Err(DataplaneError::Unavailable("table: busy".into()))),
                // What there is went, and there may be more.
                Remains {
                    unknown: Some(error("no tool")),
                    ..Remains::of(found("chains"), || Err(DataplaneError::Unavailable("no tool".into())))
                },
                Remains::of(Err(error("no leave")), || panic!("nothing is known of")),
                Remains::of(found("servers"), || Ok(())),
            ]
        };
        for (dry_run, said, trouble) in [
            (false, "removed chains\nremoved servers\n", &["table: busy", "no tool", "no leave"][..]),
            (true, "would remove table\nwould remove chains\nwould remove servers\n", &["no tool", "no leave"]),
        ] {
            let mut out = Vec::new();
            let found: Vec<_> = rules().into_iter().flat_map(|one| one.go(dry_run, &mut out).unwrap()).collect();
            assert_eq!(
                (String::from_utf8(out).unwrap().as_str(), &found[..]),
                (said, &trouble.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>()[..])
            );
        }
    }

    #[test]
    fn pins_are_found_at_any_depth_and_an_absent_directory_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(pinned(&dir.path().join("absent")).unwrap(), Vec::<PathBuf>::new());
        let maps = dir.path().join("v1/maps");
        fs::create_dir_all(&maps).unwrap();
        fs::write(maps.join("names"), "").unwrap();
        fs::write(maps.join("meta"), "").unwrap();
        assert_eq!(pinned(dir.path()).unwrap(), [maps.join("meta"), maps.join("names")]);
    }
}
