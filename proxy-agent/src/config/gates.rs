//! The names of kube-proxy's feature gates: all of them are accepted, a few of them count here.

/// Without it no external IP is served (contract A158).
const EXTERNAL_IPS: &str = "AllowServiceExternalIPs";

/// Without these there are no such pages (contract A120): both are beta, on by default.
pub const FLAGZ: &str = "ComponentFlagz";
pub const STATUSZ: &str = "ComponentStatusz";
/// What a beta gate that is not named has.
const ALL_BETA: &str = "AllBeta";

/// Whether kube-proxy knows it.
pub(super) fn is_known(gate: &str) -> bool {
    all().any(|known| known == gate)
}

fn all() -> impl Iterator<Item = &'static str> {
    include_str!("feature_gates.txt").lines().filter(|line| !line.starts_with('#'))
}

fn parts(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let parts = text.split(',').map(str::trim).filter(|one| !one.is_empty());
    parts.map(|one| match one.split_once('=') {
        Some((gate, value)) => (gate.trim(), Some(value.trim())),
        None => (one, None),
    })
}

/// Whether the gates let external IPs be served.
pub fn allow_external_ips(text: &str) -> bool {
    let said = parts(text).filter(|(gate, _)| *gate == EXTERNAL_IPS).last();
    said.and_then(|(_, value)| value).is_none_or(|value| super::boolean(value) != Ok(false))
}

/// Whether a beta gate that is on by default is on.
pub fn is_on(text: &str, beta: &str) -> bool {
    let said = |wanted| parts(text).filter(|(gate, _)| *gate == wanted).last().and_then(|(_, value)| value);
    said(beta).or_else(|| said(ALL_BETA)).is_none_or(|value| super::boolean(value) != Ok(false))
}

/// Those that change nothing here.
pub fn without_effect(text: &str) -> String {
    let others = parts(text).filter(|(gate, _)| ![EXTERNAL_IPS, FLAGZ, STATUSZ, ALL_BETA].contains(gate));
    others.map(|(gate, value)| format!("{gate}={}", value.unwrap_or_default())).collect::<Vec<_>>().join(",")
}

/// One of them, as an option has it.
pub fn feature_gate(text: &str) -> Result<String, String> {
    check(text).map(|()| text.trim().to_owned())
}

/// `A=true,B=false`; what is wrong with it, by the first that is.
pub(super) fn check(text: &str) -> Result<(), String> {
    for (gate, value) in parts(text) {
        let Some(value) = value else {
            return Err(format!("{gate:?} is no gate; write it as NAME=true or NAME=false"));
        };
        if !is_known(gate) {
            let nearest = super::field::nearest(gate, all());
            return Err(format!("kube-proxy has no feature gate {gate:?}{}", super::field::hint(nearest)));
        }
        super::boolean(value).map_err(|error| format!("{gate}: {error}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_them_counts_a158() {
        for (text, allowed, others) in [
            ("", true, ""),
            ("AllowServiceExternalIPs=false", false, ""),
            ("AllAlpha=true, AllowServiceExternalIPs = false,AllBeta=false", false, "AllAlpha=true"),
            ("AllowServiceExternalIPs=false,AllowServiceExternalIPs=true", true, ""),
        ] {
            assert_eq!((allow_external_ips(text), without_effect(text).as_str()), (allowed, others), "{text}");
        }
    }

    #[test]
    fn pages_are_there_by_their_gates_a120() {
        for (text, flagz, statusz) in [
            ("", true, true),
            ("ComponentFlagz=false", false, true),
            ("AllBeta=false", false, false),
            ("ComponentStatusz=true,AllBeta=false", false, true),
            ("ComponentFlagz=false,ComponentFlagz=true", true, true),
        ] {
            assert_eq!((is_on(text, FLAGZ), is_on(text, STATUSZ)), (flagz, statusz), "{text}");
            assert_eq!(without_effect(text), "");
        }
    }

    #[test]
    fn known_gates_are_taken_and_others_named() {
        assert_eq!(check(""), Ok(()));
        assert_eq!(check("AllAlpha=false, ContextualLogging=true"), Ok(()));
        let error = check("AllAlpha=true,ContextualLoging=true").unwrap_err();
        assert!(error.contains("\"ContextualLoging\"") && error.contains("ContextualLogging"), "{error}");
        for bad in ["AllAlpha", "AllAlpha=maybe", "=true"] {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert!(all().count() > 200 && all().is_sorted(), "the list is not what it was");
    }
}
