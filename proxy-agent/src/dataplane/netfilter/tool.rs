//! A command of the system's that programs the kernel for us: run with a time-out, its input and its complaints at hand.

use std::{
    fmt,
    io::{self, Read, Write},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use crate::dataplane::{DataplaneError, Missing};

/// A command, and how long it may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    /// Where it comes from.
    pub(crate) remedy: &'static str,
    pub(crate) patience: Duration,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum ToolError {
    Start {
        program: &'static str,
        why: String,
        remedy: &'static str,
    },
    Slow {
        program: &'static str,
        patience: Duration,
    },
    /// It ran, and said no.
    Refused {
        program: &'static str,
        said: String,
    },
}

impl std::error::Error for ToolError {}

impl fmt::Display for ToolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.missing().fmt(f)
    }
}

impl From<ToolError> for DataplaneError {
    fn from(error: ToolError) -> Self {
        Self::Missing(error.missing())
    }
}

impl ToolError {
    fn missing(&self) -> Missing {
        let (what, remedy) = match self {
            Self::Start { program, why, remedy } => (format!("{program} cannot be started: {why}"), *remedy),
            Self::Slow { program, patience } => (
                format!("{program} was ended after {} s without an answer", patience.as_secs()),
                "look for what keeps the kernel's netfilter busy",
            ),
            Self::Refused { program, said } => (format!("{program}: {said}"), ""),
        };
        Missing { what, remedy: remedy.to_owned() }
    }

    /// What to do is `remedy`, where it ran at all.
    pub(crate) fn lacking(&self, remedy: &str) -> DataplaneError {
        let missing = self.missing();
        let remedy = if self.is_refusal() { remedy.to_owned() } else { missing.remedy };
        DataplaneError::Missing(Missing { what: missing.what, remedy })
    }

    /// Whether it may lie with what was asked for.
    pub(crate) const fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// It was said of many things at once, and which of them is meant is not known.
    pub(crate) fn of_several(self) -> Self {
        match self {
            Self::Refused { program, said } => Self::Refused {
                program,
                said: format!("{said} (this or others of the same change; it is tried again)"),
            },
            other => other,
        }
    }
}

/// Lines of complaint that are worth passing on.
const LINES: usize = 4;

impl Tool {
    /// Runs it with `input`; what it printed.
    pub(crate) fn run(&self, args: &[&str], input: &str) -> Result<String, ToolError> {
        let Self { program, remedy, patience } = *self;
        let start = |why: io::Error| ToolError::Start { program, why: why.to_string(), remedy };
        let mut child = Command::new(program)
            .args(args)
            // Messages are read by us.
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(start)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (ends, ended) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                // One that ends early says why itself.
                let _unread = stdin.map(|mut stdin| stdin.write_all(input.as_bytes()));
            });
            let said = scope.spawn(move || read(stderr));
            let printed = scope.spawn(move || {
                let printed = read(stdout);
                // Its end of the pipe closes with the process.
                let _nobody_waits = ends.send(());
                printed
            });
            let in_time = ended.recv_timeout(patience).is_ok();
            let status = end(&mut child, in_time).map_err(start)?;
            let (printed, said) = (printed.join().unwrap_or_default(), said.join().unwrap_or_default());
            if !in_time {
                return Err(ToolError::Slow { program, patience });
            }
            if status { Ok(printed) } else { Err(ToolError::Refused { program, said: shorten(&said) }) }
        })
    }
}

fn read(from: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    // What could be read of it is better than nothing.
    let _broken = from.map(|mut from| from.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn end(child: &mut Child, in_time: bool) -> io::Result<bool> {
    if !in_time {
        child.kill()?;
    }
    Ok(child.wait()?.success())
}

fn shorten(said: &str) -> String {
    let mut lines =
        said.lines().map(str::trim).filter(|line| !line.is_empty() && !line.chars().all(|c| "^~ ".contains(c)));
    let mut text = lines.by_ref().take(LINES).collect::<Vec<_>>().join("; ");
    if text.len() > 600 {
        let end = (0..=600).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
        text.truncate(end);
        text.push('…');
    }
    let more = lines.count();
    if more > 0 {
        format!("{text}; {more} more lines")
    } else if text.is_empty() {
        "no reason given".into()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SH: Tool = Tool { program: "sh", remedy: "install a shell", patience: Duration::from_secs(20) };

    #[test]
    fn it_hears_and_is_heard() {
        let long = "x".repeat(1 << 20);
        assert_eq!(SH.run(&["-c", "cat"], &long).unwrap(), long);
        assert_eq!(SH.run(&["-c", "exec 0<&-; echo early"], &long).unwrap(), "early\n");
    }

    #[test]
    fn errors_say_what_happened() {
        let error = SH.run(&["-c", "for i in 1 2 3 4 5 6; do echo line $i >&2; done; exit 1"], "").unwrap_err();
        assert!(error.is_refusal());
        assert_eq!(error.to_string(), "sh: line 1; line 2; line 3; line 4; 2 more lines");
        let none = Tool { program: "/no/such/tool", remedy: "install it", ..SH };
        let error = none.run(&[], "").unwrap_err();
        assert!(!error.is_refusal() && error.to_string().ends_with("; install it"), "{error}");
        let slow = Tool { patience: Duration::from_millis(50), ..SH };
        let error = slow.run(&["-c", "exec sleep 100"], "").unwrap_err();
        assert!(matches!(error, ToolError::Slow { .. }), "{error}");
    }
}
