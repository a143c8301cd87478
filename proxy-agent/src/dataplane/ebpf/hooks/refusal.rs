//! What the kernel refuses, in a line: it says why in as many as it looked at instructions.

use std::io;

use aya::programs::ProgramError;

/// The longest that is quoted of the verifier: the state of all registers takes more.
const WORDS_MAX: usize = 160;

/// An error with all its causes. What comes in more than a line is the verifier's: its first line stands, and its last.
pub(crate) fn in_a_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    match text.split_once('\n') {
        None => text,
        Some((first, rest)) => {
            tracing::debug!("{text}");
            [first.trim(), &last_words(rest)].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ")
        }
    }
}

/// A program that the kernel does not take, and why. All that its verifier said is for the debug log.
pub(crate) fn refused(name: &str, error: &ProgramError) -> String {
    let why = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let said = verifier_log.to_string();
            tracing::debug!(program = name, "the verifier: {said}");
            [io_error.to_string(), last_words(&said)].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>()
        }
        error => vec![in_a_line(error)],
    };
    format!("the kernel refuses the program {name} ({})", why.join(": "))
}

/// What to do about that. Who may not load programs is refused before any is looked at.
pub(crate) fn remedy(error: &ProgramError) -> &'static str {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => remedy_of(io_error, &verifier_log.to_string()),
        _ => LATER,
    }
}

const LATER: &str = "use a later kernel, or --proxy-mode nftables; please report these words and the kernel";

fn remedy_of(error: &io::Error, said: &str) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) if last_words(said).is_empty() => "run with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
        _ => LATER,
    }
}

/// The last of the verifier's words, but for its statistics.
fn last_words(said: &str) -> String {
    let statistics = ["processed ", "verification time ", "stack depth "];
    let is_word = |line: &&str| !line.trim().is_empty() && !statistics.iter().any(|start| line.starts_with(start));
    let line = said.lines().rev().find(is_word).unwrap_or_default().trim();
    match line.char_indices().nth(WORDS_MAX) {
        None => line.to_owned(),
        Some((at, _)) => format!("{}…", line.get(..at).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "func#0 @0\n0: R1=ctx() R10=fp0\n0: (95) exit\nR0 !read_ok\nverification time 12 usec\nstack depth 0+0\n\
                        processed 1 insns (limit 1000000) max_states_per_insn 0 total_states 0\n\n";

    #[test]
    fn the_verifiers_last_words_are_a_line() {
        assert_eq!(last_words(SAID), "R0 !read_ok");
        assert_eq!(last_words(""), "");
        let state = format!("from 1 to 2: {}\n", "R1=scalar() ".repeat(100));
        assert_eq!(last_words(&state).chars().count(), WORDS_MAX + 1);
        // Cut between characters.
        assert!(last_words(&"ä".repeat(500)).ends_with("ä…"));
    }

    #[test]
    fn many_lines_become_one() {
        let error = io::Error::other(format!("BTF is refused. Verifier output: {SAID}"));
        assert_eq!(in_a_line(&error), "BTF is refused. Verifier output: func#0 @0: R0 !read_ok");
        assert_eq!(in_a_line(&io::Error::other("a\n\n")), "a");
    }

    #[test]
    fn who_may_not_load_is_told_so() {
        let of = |code, said| remedy_of(&io::Error::from_raw_os_error(code), said);
        assert!(of(libc::EPERM, "").contains("CAP_BPF"));
        for (code, said) in [(libc::EACCES, SAID), (libc::EPERM, SAID), (libc::EINVAL, "")] {
            assert!(of(code, said).contains("--proxy-mode nftables"), "{code}");
        }
    }
}
