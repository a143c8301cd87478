//! The bpf(2) calls of an agent, as strace(1) wrote them down: a write that changes nothing shows here and nowhere else.
//!
//! Slots are written through a mapping and never show; those that differ do in [`Pinned`](super::pins::Pinned).

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// The tracer is a grandchild (`-D`): the agent stays our own child, to be killed as ever, and takes the tracer with it.
pub(super) const ARGUMENTS: [&str; 7] = ["-D", "-f", "-y", "-s", "256", "-e", "trace=bpf"];

/// One call that succeeded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Call {
    /// `BPF_MAP_UPDATE_ELEM` …
    pub command: String,
    /// Name of the pin that the call is about, if it was opened by one.
    pub pin: Option<String>,
    /// Elements that the call is about.
    pub count: usize,
    /// Name of the program that is loaded, as far as the kernel keeps it (15 characters).
    pub program: Option<String>,
}

impl Call {
    /// Whether it changes anything that others see: an element, a link, a pin. What is loaded and not pinned is seen by nobody, and
    /// so are the elements of a map that is not: the agent tries that way what the kernel can do.
    pub fn writes(&self) -> bool {
        let is = |writes: &[&str]| {
            writes
                .iter()
                .any(|write| self.command.strip_prefix("BPF_").is_some_and(|command| command.starts_with(write)))
        };
        is(&["LINK_", "OBJ_PIN", "PROG_ATTACH", "PROG_DETACH"])
            || (is(&["MAP_UPDATE", "MAP_DELETE"]) && self.pin.is_some())
    }
}

/// Out of `PID bpf(COMMAND, {…}, SIZE) = RESULT`, in two parts if another thread's call came between.
pub(super) fn calls(text: &str) -> Result<Vec<Call>> {
    let mut pins: BTreeMap<String, String> = BTreeMap::new();
    let mut begun: BTreeMap<&str, &str> = BTreeMap::new();
    let mut calls = Vec::new();
    // The last line may be written at this moment.
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        let (thread, rest) = line.trim_start().split_once(' ').with_context(|| format!("strace wrote {line:?}"))?;
        let rest = rest.trim_start();
        if let Some(head) = rest.strip_suffix("<unfinished ...>") {
            begun.insert(thread, head);
            continue;
        }
        let whole = match rest.strip_prefix("<... bpf resumed>") {
            Some(tail) => {
                format!("{}{tail}", begun.remove(thread).with_context(|| format!("no beginning of {line:?}"))?)
            }
            None => rest.to_owned(),
        };
        // Signals and ends of threads.
        let Some(call) = whole.strip_prefix("bpf(") else { continue };
        let (arguments, result) = call.rsplit_once(" = ").with_context(|| format!("strace wrote {line:?}"))?;
        if result.starts_with(['-', '?']) {
            continue;
        }
        let command = match argument(arguments, "attach_type=") {
            // A link that a map is read through, and that ends with its reader.
            Some("BPF_TRACE_ITER") => "BPF_ITER_LINK_CREATE",
            _ => arguments.split(',').next().unwrap_or_default(),
        };
        let command = command.to_owned();
        let pin = if command == "BPF_OBJ_GET" {
            let pin = argument(arguments, "pathname=\"")
                .and_then(|path| path.split(['"', '/']).rfind(|part| !part.is_empty()));
            pins.insert(descriptor(result).to_owned(), pin.unwrap_or_default().to_owned());
            pin.map(str::to_owned)
        } else if command == "BPF_MAP_CREATE" {
            // The number may have been another map's, which is closed.
            pins.remove(descriptor(result));
            None
        } else {
            argument(arguments, "map_fd=").and_then(|fd| pins.get(descriptor(fd)).cloned())
        };
        let count = argument(arguments, "count=").filter(|_| command.contains("BATCH"));
        let count = count.and_then(|count| count.split([',', '}', ' ']).next()?.parse().ok()).unwrap_or(1);
        let program = argument(arguments, "prog_name=\"").filter(|name| command == "BPF_PROG_LOAD" && !name.is_empty());
        calls.push(Call { program: program.map(str::to_owned), command, pin, count });
    }
    Ok(calls)
}

/// What follows a name, up to the next argument; a path ends with its quotation mark.
fn argument<'a>(arguments: &'a str, name: &str) -> Option<&'a str> {
    let (_, value) = arguments.split_once(name)?;
    value.split([',', '"']).next()
}

/// `11<anon_inode:bpf-map>` and `11`.
fn descriptor(text: &str) -> &str {
    text.split(['<', ' ', ',']).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read_out_of_a_trace() {
        let text = r#"
7 bpf(BPF_OBJ_GET, {pathname="/sys/fs/bpf/x/v1/maps/frontends_v4", bpf_fd=0</dev/null>, file_flags=0}, 16) = 11<anon_inode:bpf-map>
7 bpf(BPF_LINK_CREATE, {link_create={prog_fd=20<anon_inode:bpf-prog>, target_fd=2147483647}}, 32) = -1 ENODEV (No such device)
7 bpf(BPF_MAP_UPDATE_BATCH, {batch={keys=0x5, values=0x7, count=2, map_fd=11<anon_inode:bpf-map>, flags=0}}, 56 <unfinished ...>
8 bpf(BPF_MAP_LOOKUP_ELEM, {map_fd=12<anon_inode:bpf-map>, key=0x5, value=0x7}, 32) = 0
7 <... bpf resumed>) = 0
7 bpf(BPF_LINK_CREATE, {link_create={prog_fd=20<anon_inode:bpf-prog>, target_fd=0</dev/null>, attach_type=BPF_TRACE_ITER, flags=0}}, 64) = 21<anon_inode:bpf_link>
7 bpf(BPF_LINK_CREATE, {link_create={prog_fd=20<anon_inode:bpf-prog>, target_fd=3, attach_type=BPF_TCX_INGRESS, flags=0}}, 64) = 21<anon_inode:bpf_link>
7 bpf(BPF_MAP_CREATE, {map_type=BPF_MAP_TYPE_ARRAY, key_size=4}, 80) = 11<anon_inode:bpf-map>
7 bpf(BPF_PROG_LOAD, {prog_type=BPF_PROG_TYPE_SCHED_CLS, insn_cnt=2, insns=0x5, license="GPL", log_level=0, prog_name="tc_ingress_ethe", prog_ifindex=0}, 152) = 22<anon_inode:bpf-prog>
7 bpf(BPF_MAP_UPDATE_ELEM, {map_fd=11<anon_inode:bpf-map>, key=0x5, value=0x7, flags=BPF_ANY}, 32) = 0
8 +++ killed by SIGKILL +++"#;
        let seen = calls(text.trim_start()).unwrap();
        let call = |command: &str, pin: Option<&str>, count| Call {
            command: command.to_owned(),
            pin: pin.map(str::to_owned),
            count,
            program: None,
        };
        let load = Call { program: Some("tc_ingress_ethe".to_owned()), ..call("BPF_PROG_LOAD", None, 1) };
        assert_eq!(
            seen,
            [
                call("BPF_OBJ_GET", Some("frontends_v4"), 1),
                call("BPF_MAP_LOOKUP_ELEM", None, 1),
                call("BPF_MAP_UPDATE_BATCH", Some("frontends_v4"), 2),
                call("BPF_ITER_LINK_CREATE", None, 1),
                call("BPF_LINK_CREATE", None, 1),
                call("BPF_MAP_CREATE", None, 1),
                load,
                call("BPF_MAP_UPDATE_ELEM", None, 1),
            ]
        );
        assert_eq!(
            seen.iter().map(Call::writes).collect::<Vec<_>>(),
            [false, false, true, false, true, false, false, false]
        );
    }
}
