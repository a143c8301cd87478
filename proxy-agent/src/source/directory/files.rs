//! Which files there are, and whether they changed since.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Tells one state of a file from another without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Signature {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Signature {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// How the file at `path` looks now.
pub(super) fn signature(path: &Path) -> io::Result<Signature> {
    fs::metadata(path).map(|metadata| Signature::of(&metadata))
}

/// One walk over the tree.
#[derive(PartialEq, Eq, Debug, Default)]
pub(super) struct Listing {
    pub(super) files: BTreeMap<PathBuf, Signature>,
    /// Places that could not be looked at. What was known below them is not known to be gone.
    pub(super) unreadable: BTreeMap<PathBuf, String>,
}

/// Lists every file below `root` that a source reads. Symbolic links are followed, as mounted ConfigMaps consist of them; names
/// that start with a dot are not read: editors keep their half-done work there, and ConfigMaps their older states.
pub(super) fn list(root: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let mut visited = BTreeSet::new();
    let mut directories = vec![root.to_path_buf()];
    while let Some(directory) = directories.pop() {
        match list_directory(&directory, &mut visited, &mut listing, &mut directories) {
            Ok(()) => {}
            Err(error) if directory == root => return Err(error),
            // Gone since its parent was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                listing.unreadable.insert(directory, error.to_string());
            }
        }
    }
    Ok(listing)
}

fn list_directory(
    directory: &Path,
    visited: &mut BTreeSet<(u64, u64)>,
    listing: &mut Listing,
    directories: &mut Vec<PathBuf>,
) -> io::Result<()> {
    let metadata = fs::metadata(directory)?;
    // A link that leads back up would never end.
    if !visited.insert((metadata.dev(), metadata.ino())) {
        return Ok(());
    }
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => directories.push(path),
            Ok(metadata) if metadata.is_file() && is_read(&path) => {
                listing.files.insert(path, Signature::of(&metadata));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                listing.unreadable.insert(path, error.to_string());
            }
        }
    }
    Ok(())
}

fn is_read(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|read| extension == *read))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(root: &Path) -> Vec<String> {
        let listing = list(root).unwrap();
        assert_eq!(listing.unreadable, BTreeMap::new());
        listing.files.keys().map(|path| path.strip_prefix(root).unwrap().display().to_string()).collect()
    }

    #[test]
    fn what_is_read() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::create_dir(root.join(".git")).unwrap();
        for name in [
            "x.yaml",
            "a/y.yml",
            "a/b/z.json",
            "a/n.txt",
            "a/.x.yaml.swp",
            "a/.h.yaml",
            "x.yaml~",
            ".git/g.yaml",
            "yaml",
        ] {
            fs::write(root.join(name), "").unwrap();
        }
        symlink(root, root.join("a/b/loop")).unwrap();
        symlink("nowhere.yaml", root.join("dangling.yaml")).unwrap();
        symlink("n.txt", root.join("a/linked.yaml")).unwrap();
        assert_eq!(names(root), ["a/b/z.json", "a/linked.yaml", "a/y.yml", "x.yaml"]);
    }

    #[test]
    fn a_mounted_config_map() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (state, text) in [("..1", "a"), ("..2", "b")] {
            fs::create_dir(root.join(state)).unwrap();
            fs::write(root.join(state).join("s.yaml"), text).unwrap();
        }
        symlink("..1", root.join("..data")).unwrap();
        symlink("..data/s.yaml", root.join("s.yaml")).unwrap();
        assert_eq!(names(root), ["s.yaml"]);
        let before = list(root).unwrap();
        symlink("..2", root.join("..data_tmp")).unwrap();
        fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
        assert_eq!(names(root), ["s.yaml"]);
        assert_ne!(list(root).unwrap(), before);
    }

    #[test]
    fn no_such_directory() {
        assert_eq!(list(Path::new("/nonexistent/dir")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
