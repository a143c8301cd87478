//! The names of kube-proxy's feature gates: all of them are accepted, one of them counts here.

/// Without it no external IP is served (contract A158).
const EXTERNAL_IPS: &str = "AllowServiceExternalIPs";

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

/// Those that change nothing here.
pub fn without_effect(text: &str) -> String {
    let others = parts(text).filter(|(gate, _)| *gate != EXTERNAL_IPS);
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
            ("AllAlpha=true, AllowServiceExternalIPs = false,AllBeta=false", false, "AllAlpha=true,AllBeta=false"),
            ("AllowServiceExternalIPs=false,AllowServiceExternalIPs=true", true, ""),
        ] {
            assert_eq!((allow_external_ips(text), without_effect(text).as_str()), (allowed, others), "{text}");
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
