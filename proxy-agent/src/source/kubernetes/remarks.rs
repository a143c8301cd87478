//! What is wrong with objects of one kind, bounded where it is handed on: a cluster may hold thousands of the same sort.

use std::collections::BTreeMap;

use tracing::{info, warn};

/// Objects named; the others are counted.
const NAMED: usize = 32;

#[derive(Default)]
pub(super) struct Remarks {
    known: BTreeMap<String, String>,
    /// Of a list that is not complete yet.
    listed: BTreeMap<String, String>,
    /// As handed on last.
    told: BTreeMap<String, Vec<String>>,
    changed: bool,
}

impl Remarks {
    /// Of one object of a list.
    pub(super) fn listed(&mut self, object: String, why: String) {
        self.listed.insert(object, why);
    }

    pub(super) fn list_lost(&mut self) {
        self.listed.clear();
    }

    /// A complete list replaces all that was said.
    pub(super) fn list_done(&mut self) {
        self.known = std::mem::take(&mut self.listed);
        self.changed = true;
    }

    pub(super) fn set(&mut self, object: String, why: String) {
        self.changed |= self.known.get(&object) != Some(&why);
        self.known.insert(object, why);
    }

    /// Nothing is wrong with it any more. Hardly ever was anything: then not even its name is put together.
    pub(super) fn clear(&mut self, object: impl FnOnce() -> String) {
        if !self.known.is_empty() {
            self.changed |= self.known.remove(&object()).is_some();
        }
    }

    /// What to hand on, if that is not what it was.
    pub(super) fn news(&mut self) -> Option<BTreeMap<String, Vec<String>>> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let mut news: BTreeMap<String, Vec<String>> =
            self.known.iter().take(NAMED).map(|(object, why)| (object.clone(), vec![why.clone()])).collect();
        let more = self.known.len() - news.len();
        if let (1.., Some((object, _))) = (more, self.known.last_key_value()) {
            let kind = object.split(' ').next().unwrap_or_default();
            news.insert(format!("{kind}s"), vec![format!("… and {more} more cannot be used")]);
        }
        if news == self.told {
            return None;
        }
        for (object, why) in news.iter().filter(|(object, why)| self.told.get(*object) != Some(*why)) {
            warn!("{object}: {}", why.concat());
        }
        for object in self.told.keys().filter(|object| !news.contains_key(*object)) {
            info!("{object}: its problem is over");
        }
        self.told.clone_from(&news);
        Some(news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_bounded_and_new() {
        let mut remarks = Remarks::default();
        assert_eq!(remarks.news(), None);
        for number in 0..100 {
            remarks.listed(format!("EndpointSlice ns/{number:03}"), "bad".to_owned());
        }
        remarks.list_done();
        let news = remarks.news().unwrap();
        assert_eq!((news.len(), &*news["EndpointSlices"][0]), (33, "… and 68 more cannot be used"));
        remarks.set("EndpointSlice ns/000".to_owned(), "bad".to_owned());
        assert_eq!(remarks.news(), None, "nothing new");
        for number in 10..100 {
            remarks.clear(|| format!("EndpointSlice ns/{number:03}"));
        }
        assert_eq!(remarks.news().unwrap().len(), 10);
        remarks.listed("EndpointSlice ns/x".to_owned(), "bad".to_owned());
        remarks.list_lost();
        remarks.list_done();
        assert_eq!(remarks.news(), Some(BTreeMap::new()));
    }
}
