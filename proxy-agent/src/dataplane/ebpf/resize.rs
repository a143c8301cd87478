//! Maps that change their size: made anew beside the old ones, filled, and put in their place once every link has moved.
//!
//! ```text
//! v1/maps/<name>            what the programs in force use                ─┐ replaced by one rename each
//! v1/maps/<name>-resized    the same of the new size, waiting             ─┘ once no link uses the old ones
//! v1/moving                 all that wait are whole; links may be using them
//! v1/maps/<name>-former     what links use that had not moved when yet other sizes were wanted
//! ```
//!
//! INVARIANT: whatever instant the process dies at, each link runs programs whose maps hold everything that was in force, and the next
//! process finds what either kind of programs wrote. Without `moving` no link has moved: what waits is nothing and goes. With it
//! what waits is as good as in place, and newer: it is gone on with, or put in place first where yet other sizes are wanted. What was in
//! that place is kept until no link uses it: its programs go on writing to it meanwhile.

use std::{collections::HashSet, fs, io, os::fd::AsFd, path::Path};

use super::{
    kernel,
    layout::{MapName, Sizes},
    maps,
    pins::Layout,
    sys,
};
use crate::dataplane::DataplaneError;

/// Counts what is done, so that a test can end it anywhere.
#[derive(Debug)]
pub(super) struct Steps {
    left: Option<u32>,
}

impl Steps {
    pub(super) const fn endless() -> Self {
        Self { left: None }
    }

    pub(super) const fn at_most(steps: u32) -> Self {
        Self { left: Some(steps) }
    }

    /// Before each step; once one was refused, all are.
    pub(super) fn next(&mut self) -> Result<(), DataplaneError> {
        match &mut self.left {
            None => Ok(()),
            Some(0) => Err(DataplaneError::Unavailable("dead, on purpose".into())),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

/// What an earlier process left half done. Returns whether its links had begun to move to maps of the sizes that are wanted now, so
/// that they only have to go on.
pub(super) fn recover(layout: &Layout, sizes: &Sizes, steps: &mut Steps) -> Result<bool, DataplaneError> {
    let waiting = || MapName::ALL.iter().copied().filter(|map| layout.resized(*map).exists());
    if !layout.moving().exists() {
        for map in waiting() {
            fs::remove_file(layout.resized(map)).map_err(kernel(format!("map {map}, half made")))?;
        }
        return Ok(false);
    }
    let fits = |map: MapName| {
        let path = if layout.resized(map).exists() { layout.resized(map) } else { layout.map(map) };
        let have = sys::open(&path).and_then(|fd| sys::map_info(fd.as_fd()));
        have.is_ok_and(|have| have.max_entries == map.info(sizes).max_entries)
    };
    if waiting().next().is_some() && MapName::ALL.iter().copied().all(fits) {
        tracing::info!("an earlier process died while links moved to maps of another size; going on");
        return Ok(true);
    }
    let maps: Vec<_> = waiting().collect();
    for map in maps.iter().copied().filter(|map| map.is_written_by_programs()) {
        steps.next()?;
        match fs::hard_link(layout.map(map), layout.former(map)) {
            // By an earlier process that died here, or before its links had moved.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(kernel(format!("keep map {map}"))(error));
            }
            _ => {}
        }
    }
    copy(layout, maps.iter().copied().filter(|map| map.is_written_by_programs()), sys::NOEXIST, steps)?;
    put_in_place(layout, &maps, steps)?;
    Ok(false)
}

/// From here on a link may use the maps that wait.
pub(super) fn begin_moving(layout: &Layout) -> Result<(), DataplaneError> {
    match fs::create_dir(layout.moving()) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(kernel(layout.moving().display().to_string())(error))
        }
        _ => Ok(()),
    }
}

/// Ends it: no link uses the old maps any more.
pub(super) fn put_in_place(layout: &Layout, maps: &[MapName], steps: &mut Steps) -> Result<(), DataplaneError> {
    for map in maps {
        steps.next()?;
        match fs::rename(layout.resized(*map), layout.map(*map)) {
            // In place since a try that failed later.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(kernel(format!("map {map}"))(error)),
            _ => {}
        }
    }
    steps.next()?;
    match fs::remove_dir(layout.moving()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(kernel(layout.moving().display().to_string())(error))
        }
        _ => Ok(()),
    }
}

/// Compares the pinned maps with what they should be. Returns those whose size differs, each made anew beside the old one;
/// `moving`: or was by an earlier process, whose links had begun to move.
pub(super) fn check(layout: &Layout, sizes: &Sizes, moving: bool) -> Result<Vec<MapName>, DataplaneError> {
    let mut resized = vec![];
    for map in MapName::ALL.iter().copied() {
        let fd = match sys::open(&layout.map(map)) {
            Ok(fd) => fd,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(kernel(format!("pinned map {map}"))(error)),
        };
        let have = sys::map_info(fd.as_fd()).map_err(kernel(format!("pinned map {map}")))?;
        let want = map.info(sizes);
        // Flags may hold bits that the kernel added.
        if (have.kind, have.key, have.value) != (want.kind, want.key, want.value)
            || have.flags & want.flags != want.flags
        {
            return Err(DataplaneError::Unavailable(format!(
                "pinned map {} has another layout ({have:?}, not {want:?}): it was not made by this program; run `proxy-agent \
                 cleanup` or use another --bpffs",
                layout.map(map).display()
            )));
        }
        if moving && layout.resized(map).exists() {
            resized.push(map);
        } else if have.max_entries != want.max_entries {
            let used = used_entries(map, fd.as_fd()).map_err(kernel(format!("pinned map {map}")))?;
            if used > u64::from(want.max_entries) {
                // Slots stay where they are: what counts is the highest that was ever used.
                return Err(DataplaneError::Unavailable(format!(
                    "pinned map {map} needs {used} entries, {} {} leaves it {}: raise it, or run `proxy-agent cleanup` before the next \
                     start, which interrupts what is served",
                    map.option(),
                    want.max_entries,
                    want.max_entries
                )));
            }
            tracing::info!(map = map.as_str(), from = have.max_entries, to = want.max_entries, "changes its size");
            resized.push(map);
        }
    }
    Ok(resized)
}

/// Entries that a new map must have room for; 0 where it may forget.
fn used_entries(map: MapName, fd: std::os::fd::BorrowedFd<'_>) -> io::Result<u64> {
    use proxy_common::slot::{Slot, SlotV4, SlotV6};
    fn last<T: Slot + aya::Pod>(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<u64> {
        let slots = maps::MappedArray::<T>::new(fd, false)?;
        let last = (0..slots.len()).rev().find(|index| !slots.read(*index).is_virgin());
        Ok(last.map_or(0, |index| u64::from(index) + 1))
    }
    match map {
        MapName::SlotsV4 => last::<SlotV4>(fd),
        MapName::SlotsV6 => last::<SlotV6>(fd),
        MapName::FrontendsV4
        | MapName::FrontendsV6
        | MapName::SourceRangesV4
        | MapName::SourceRangesV6
        | MapName::Names => {
            let info = sys::map_info(fd)?;
            let mut count = 0;
            sys::dump(fd, info.key as usize, info.value as usize, |_, _| count += 1)?;
            Ok(count)
        }
        _ => Ok(0),
    }
}

/// Ids that have a name. The counters of others are of Services that are gone, and would be the next one's that gets the id.
fn counted(layout: &Layout) -> io::Result<HashSet<u32>> {
    let resized = layout.resized(MapName::Names);
    let path = if resized.exists() { resized } else { layout.map(MapName::Names) };
    let names = sys::Map::<u32, proxy_common::meta::ServiceName>::new(sys::open_read_only(&path)?)?;
    Ok(names.entries()?.into_iter().map(|(id, _)| id).collect())
}

/// Brings what is in the maps to those that wait.
pub(super) fn copy(
    layout: &Layout,
    maps: impl Iterator<Item = MapName>,
    flags: u64,
    steps: &mut Steps,
) -> Result<(), DataplaneError> {
    for map in maps {
        steps.next()?;
        copy_one(layout, map, &layout.map(map), &layout.resized(map), flags)?;
    }
    Ok(())
}

fn copy_one(layout: &Layout, map: MapName, from: &Path, to: &Path, flags: u64) -> Result<(), DataplaneError> {
    use proxy_common::slot::{SlotV4, SlotV6};
    fn slots<T: proxy_common::slot::Slot + aya::Pod>(from: &Path, to: &Path) -> io::Result<()> {
        let from = maps::MappedArray::<T>::new(sys::open(from)?.as_fd(), false)?;
        maps::MappedArray::<T>::new(sys::open(to)?.as_fd(), true)?.copy_from(&from);
        Ok(())
    }
    let copied = match map {
        MapName::SlotsV4 => slots::<SlotV4>(from, to),
        MapName::SlotsV6 => slots::<SlotV6>(from, to),
        MapName::ServiceCounters => counted(layout).and_then(|ids| {
            let is_counted = |key: &[u8]| key.try_into().is_ok_and(|id| ids.contains(&u32::from_ne_bytes(id)));
            maps::copy_entries(map, from, to, flags, &is_counted)
        }),
        _ => maps::copy_entries(map, from, to, flags, &|_| true),
    };
    copied.map_err(kernel(format!("copy map {map}")))
}

/// Maps of two changes ago that links may still use.
pub(super) fn former(layout: &Layout) -> Vec<MapName> {
    MapName::ALL.iter().copied().filter(|map| layout.former(*map).exists()).collect()
}

/// Brings what programs wrote to those to the newest maps there are.
pub(super) fn copy_former(layout: &Layout, maps: &[MapName], steps: &mut Steps) -> Result<(), DataplaneError> {
    for map in maps.iter().copied() {
        steps.next()?;
        let resized = layout.resized(map);
        let to = if resized.exists() { resized } else { layout.map(map) };
        copy_one(layout, map, &layout.former(map), &to, sys::NOEXIST)?;
    }
    Ok(())
}

/// Ends it: no link uses them any more.
pub(super) fn forget_former(layout: &Layout, maps: &[MapName], steps: &mut Steps) -> Result<(), DataplaneError> {
    for map in maps {
        steps.next()?;
        match fs::remove_file(layout.former(*map)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(kernel(format!("former map {map}"))(error));
            }
            _ => {}
        }
    }
    Ok(())
}
