//! `route_localnet`, which node ports of 127.0.0.1 take (contract A54): it lets packets for loopback in from the node's neighbours (CVE-2020-8558).
//!
//! What it was before stands in the rule that keeps those out: whoever removes that rule knows it, and nobody removes the one without the other.

use std::{fs, io, path::PathBuf};

use crate::dataplane::{DataplaneError, netfilter::settings};

/// What is noted stands behind this.
const BEFORE: &str = "route_localnet was ";

const REMEDY: &str = "mount /proc/sys writable, or set it by hand";

/// The setting, by its file.
#[derive(Clone, Debug)]
pub(super) struct RouteLocalnet(pub(super) PathBuf);

/// Of the network namespace of the thread that asks.
pub(super) fn here() -> RouteLocalnet {
    RouteLocalnet(settings::directory().join("ipv4/conf/all/route_localnet"))
}

impl RouteLocalnet {
    fn read(&self) -> io::Result<i32> {
        fs::read_to_string(&self.0)?.trim().parse().map_err(io::Error::other)
    }

    /// What is to be noted, where nothing is.
    pub(super) fn before(&self) -> Option<i32> {
        self.read().ok()
    }

    /// Not where it cannot be read: nobody could put it back.
    pub(super) fn open(&self) -> Result<(), DataplaneError> {
        let set = |value| if value == 1 { Ok(()) } else { fs::write(&self.0, "1") };
        self.read().and_then(set).map_err(|error| {
            DataplaneError::Unavailable(format!(
                "{} cannot be set to 1 ({error}); until it is, NodePorts on 127.0.0.1 do not answer: {REMEDY}",
                self.0.display()
            ))
        })
    }

    /// To what was noted, if anything was. What somebody else has set meanwhile stays.
    pub(super) fn put_back(&self, noted: Option<i32>) -> Result<(), DataplaneError> {
        let Some(before) = noted.filter(|before| *before != 1) else { return Ok(()) };
        // What cannot be read may stand.
        let set = |value| if value == 1 { fs::write(&self.0, before.to_string()) } else { Ok(()) };
        self.read().and_then(set).map_err(|error| {
            DataplaneError::Unavailable(format!(
                "{} cannot be set back to {before} ({error}); until it is, the rule that keeps the node's neighbours from its loopback stays: {REMEDY}",
                self.0.display()
            ))
        })
    }
}

/// The comment of the rule.
pub(super) fn note(before: i32) -> String {
    format!("{BEFORE}{before}")
}

/// What [`note`] wrote.
pub(super) fn noted(comment: &str) -> Option<i32> {
    comment.strip_prefix(BEFORE)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{super::save::Saved, *};

    fn saved(before: &str) -> Option<i32> {
        let mut saved = Saved::default();
        saved.parse(&format!(
            "*filter\n:PROXY-LOOPBACK - [0:0]\n-A INPUT -m comment --comment \"route_localnet was 7\" -j PROXY-LOOPBACK\n\
             -A PROXY-LOOPBACK ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"{before}\" -j DROP\nCOMMIT\n"
        ));
        saved.route_localnet()
    }

    #[test]
    fn what_it_was_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("route_localnet");
        let (setting, set) = (RouteLocalnet(file.clone()), |value: &str| fs::write(&file, value).unwrap());
        let put_back = |before: &str| {
            setting.put_back(saved(before)).unwrap();
            setting.read().unwrap()
        };
        set("0\n");
        let before = setting.before().unwrap();
        setting.open().unwrap();
        assert_eq!(setting.before(), Some(1));
        assert_eq!(put_back("somebody else's words"), 1);
        assert_eq!(put_back(&note(before)), 0);
        set("1\n");
        assert_eq!(put_back(&note(1)), 1, "it was so before");
        set("2\n");
        assert_eq!(put_back(&note(0)), 2, "somebody else's stays");
        setting.put_back(None).unwrap();
        assert_eq!(setting.before(), Some(2));
    }

    /// It may stand all the same.
    #[test]
    fn what_cannot_be_read_is_not_known_to_be_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("route_localnet");
        let setting = RouteLocalnet(file.clone());
        let said = |result: Result<(), DataplaneError>| result.unwrap_err().to_string();
        for text in [None, Some("")] {
            if let Some(text) = text {
                fs::write(&file, text).unwrap();
            }
            let stays = said(setting.put_back(Some(0)));
            assert!(stays.contains("cannot be set back to 0") && stays.contains("the rule that keeps"), "{stays}");
            assert!(said(setting.open()).contains("NodePorts on 127.0.0.1 do not answer"));
            assert_eq!(setting.before(), None);
            for noted in [None, Some(1)] {
                setting.put_back(noted).unwrap();
            }
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "", "nobody could put it back");
    }
}
