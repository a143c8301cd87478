//! Finds out what is wrong with a change that is refused as a whole.

use std::time::{Duration, Instant, SystemTime};

use super::tool::ToolError;

/// What is tried at least to find out, however long it takes.
const TRIES: u32 = 64;
/// How long more is tried. What is not found by then fails along with what is, and is found when it is tried again.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Sifted<T> {
    pub(crate) good: Vec<T>,
    pub(crate) bad: Vec<(T, ToolError)>,
}

/// Halves until what is wrong is found. `check` says whether all of these would be taken.
pub(crate) fn sift<T>(mut items: Vec<T>, check: &mut dyn FnMut(&[T]) -> Result<(), ToolError>) -> Sifted<T> {
    // What is not found in time is not always the same.
    let turn = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos() as usize;
    let turn = turn.checked_rem(items.len()).unwrap_or_default();
    items.rotate_left(turn);
    sift_for(items, PATIENCE, check)
}

fn sift_for<T>(items: Vec<T>, patience: Duration, check: &mut dyn FnMut(&[T]) -> Result<(), ToolError>) -> Sifted<T> {
    let start = Instant::now();
    let mut sifted = Sifted { good: Vec::new(), bad: Vec::new() };
    let mut open = vec![items];
    let mut tries = TRIES;
    while let Some(mut some) = open.pop() {
        if some.is_empty() {
            continue;
        }
        let known = sifted.good.len();
        sifted.good.append(&mut some);
        tries = tries.saturating_sub(1);
        let Err(error) = check(&sifted.good) else { continue };
        let mut some = sifted.good.split_off(known);
        let over = tries == 0 && start.elapsed() >= patience;
        if some.len() == 1 || !error.is_refusal() {
            sifted.bad.extend(some.into_iter().map(|item| (item, error.clone())));
        } else if over {
            open.push(some);
        } else {
            let other = some.split_off(some.len() / 2);
            open.push(other);
            open.push(some);
        }
        if over {
            let error = error.of_several();
            sifted.bad.extend(open.drain(..).flatten().map(|item| (item, error.clone())));
        }
    }
    sifted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> ToolError {
        ToolError::Refused { program: "test", said: "no".into() }
    }

    #[test]
    fn what_is_wrong_is_found() {
        let found = |sifted: Sifted<i32>| {
            let mut bad: Vec<i32> = sifted.bad.into_iter().map(|(item, _)| item).collect();
            bad.sort_unstable();
            (sifted.good.len(), bad)
        };
        let wrong = vec![3, 500, 501];
        let mut tries = 0;
        let sifted = sift((0..1000).collect(), &mut |items| {
            tries += 1;
            if items.iter().any(|item| wrong.contains(item)) { Err(refused()) } else { Ok(()) }
        });
        assert_eq!(found(sifted), (997, wrong));
        assert!(tries < 70, "{tries}");
        let all_wrong = sift((0..1000).collect(), &mut |_| Err(refused()));
        assert_eq!((all_wrong.good.len(), all_wrong.bad.len()), (0, 1000));
        // So many that a fixed number of tries would take their neighbours for wrong, too.
        let wrong: Vec<i32> = (0..1000).step_by(50).collect();
        let sifted = sift((0..1000).collect(), &mut |items| {
            if items.iter().any(|item| wrong.contains(item)) { Err(refused()) } else { Ok(()) }
        });
        assert_eq!(found(sifted), (980, wrong));
    }

    #[test]
    fn what_is_not_found_in_time_says_so() {
        let is_wrong = |item: &i32| item % 50 == 0;
        let mut tries = 0;
        let sifted = sift_for((0..1000).collect(), Duration::ZERO, &mut |items| {
            tries += 1;
            if items.iter().any(is_wrong) { Err(refused()) } else { Ok(()) }
        });
        assert!(tries < TRIES + 10 && !sifted.good.is_empty(), "{tries}");
        assert_eq!(sifted.good.len() + sifted.bad.len(), 1000);
        let (known, not_known): (Vec<_>, Vec<_>) =
            sifted.bad.iter().partition(|(_, error)| !error.to_string().contains("others"));
        assert!(known.iter().all(|(item, _)| is_wrong(item)) && known.len() > 2, "{known:?}");
        assert!(not_known.iter().any(|(item, _)| !is_wrong(item)));
    }
}
