//! What several frontends share: it comes with the first of them and goes with the last.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

/// How many need each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Counted<T: Hash + Eq>(HashMap<T, u32>);

impl<T: Hash + Eq> Default for Counted<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

/// A change of counts that is not carried out yet.
#[derive(Clone, Debug)]
pub(crate) struct Delta<T>(BTreeMap<T, i64>);

impl<T> Default for Delta<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Ord> Delta<T> {
    pub(crate) fn more(&mut self, one: T) {
        *self.0.entry(one).or_default() += 1;
    }

    pub(crate) fn less(&mut self, one: T) {
        *self.0.entry(one).or_default() -= 1;
    }
}

impl<T: Hash + Eq + Ord + Clone> Counted<T> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.keys()
    }

    fn count(&self, one: &T) -> i64 {
        self.0.get(one).copied().unwrap_or_default().into()
    }

    /// What comes and what goes by `delta`, each in order.
    pub(crate) fn turn<'a>(&self, delta: &'a Delta<T>) -> (Vec<&'a T>, Vec<&'a T>) {
        let after = |one: &T, change: i64| (self.count(one) > 0, self.count(one) + change > 0);
        let pick = |wanted: (bool, bool)| {
            let changed = delta.0.iter().filter(move |(one, change)| after(one, **change) == wanted);
            changed.map(|(one, _)| one).collect()
        };
        (pick((false, true)), pick((true, false)))
    }

    pub(crate) fn carry_out(&mut self, delta: Delta<T>) {
        for (one, change) in delta.0 {
            match u32::try_from(self.count(&one) + change) {
                Ok(count @ 1..) => drop(self.0.insert(one, count)),
                _ => drop(self.0.remove(&one)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_with_the_first_and_goes_with_the_last() {
        let mut counted = Counted::default();
        let mut turn = |more: &[&'static str], less: &[&'static str]| {
            let mut delta = Delta::default();
            more.iter().for_each(|one| delta.more(*one));
            less.iter().for_each(|one| delta.less(*one));
            let (come, go) = counted.turn(&delta);
            let text = format!("{come:?} {go:?}");
            counted.carry_out(delta);
            text
        };
        assert_eq!(turn(&["a", "b", "a"], &[]), r#"["a", "b"] []"#);
        assert_eq!(turn(&["b"], &["a", "b"]), "[] []");
        assert_eq!(turn(&["c"], &["a", "b"]), r#"["c"] ["a", "b"]"#);
        assert_eq!(turn(&[], &["c"]), r#"[] ["c"]"#);
        assert_eq!(counted.iter().count(), 0);
    }
}
