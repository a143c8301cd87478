//! The file system that a guest starts with: an archive (cpio, "newc") that the kernel unpacks into memory.
//!
//! Programs of this machine go in with the libraries that they load, at the names that they have here: so what a test program
//! was compiled to look for is where it looks. Nothing is linked statically for it: the guest runs what the worlds of this machine run, and no
//! second target has to be installed and built.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufWriter, Write},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::command::{ask, check, command, find};

enum Entry {
    Directory,
    File {
        from: PathBuf,
        mode: u32,
    },
    Text {
        text: String,
        mode: u32,
    },
    Link {
        to: PathBuf,
    },
    /// A character device.
    Device {
        major: u32,
        minor: u32,
    },
}

#[derive(Default)]
pub struct Initramfs {
    /// By its path: a directory comes before what is in it.
    entries: BTreeMap<PathBuf, Entry>,
}

/// Names that lead elsewhere, so that a program or library has one place whatever it is called by.
const MERGED: [(&str, &str); 5] = [
    ("/bin", "/usr/bin"),
    ("/sbin", "/usr/bin"),
    ("/usr/sbin", "/usr/bin"),
    ("/lib", "/usr/lib"),
    ("/lib64", "/usr/lib64"),
];

impl Initramfs {
    pub fn new() -> Self {
        let mut new = Self::default();
        for (name, to) in MERGED {
            new.directory(Path::new(to));
            new.entries.insert(name.into(), Entry::Link { to: to.into() });
        }
        new.directory(Path::new("/dev"));
        // What the kernel gives the first process as its standard input and output.
        new.entries.insert("/dev/console".into(), Entry::Device { major: 5, minor: 1 });
        new
    }

    pub fn directory(&mut self, at: &Path) {
        let ways: Vec<&Path> = at.ancestors().filter(|path| *path != Path::new("/")).collect();
        for directory in ways {
            self.entries.entry(directory.to_owned()).or_insert(Entry::Directory);
        }
    }

    fn put(&mut self, at: &Path, entry: Entry) {
        let at = merged(at);
        if let Some(parent) = at.parent() {
            self.directory(parent);
        }
        self.entries.insert(at, entry);
    }

    pub fn text(&mut self, at: &str, text: String, mode: u32) {
        self.put(Path::new(at), Entry::Text { text, mode });
    }

    pub fn file(&mut self, at: &Path, from: &Path, mode: u32) {
        self.put(at, Entry::File { from: from.to_owned(), mode });
    }

    /// A directory with all that is in it.
    pub fn tree(&mut self, at: &Path, from: &Path) -> Result<()> {
        self.directory(&merged(at));
        for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
            let entry = entry?;
            let (at, from) = (at.join(entry.file_name()), entry.path());
            if from.is_dir() {
                self.tree(&at, &from)?;
            } else {
                self.file(&at, &from, 0o644);
            }
        }
        Ok(())
    }

    /// A program of this machine by its name, and the libraries that it loads. Whether there is one.
    pub fn tool(&mut self, name: &str) -> Result<bool> {
        let Some(path) = find(name) else { return Ok(false) };
        let from = path.canonicalize().with_context(|| format!("cannot read {}", path.display()))?;
        self.libraries(&from);
        // By this name, whatever it leads to: some programs go by how they were called.
        self.file(&Path::new("/usr/bin").join(name), &from, 0o755);
        Ok(true)
    }

    /// A program that was built here, at the name that it has here, without what only a debugger reads.
    pub fn built(&mut self, program: &Path, stripped: &Path) -> Result<()> {
        let name = program.file_name().context("a program without a name")?;
        fs::create_dir_all(stripped)?;
        let small = stripped.join(name);
        check(command("strip").arg("-o").arg(&small).arg(program))?;
        self.libraries(program);
        self.file(program, &small, 0o755);
        Ok(())
    }

    /// What a program loads, by the loader's own word; a static one loads nothing.
    pub fn libraries(&mut self, program: &Path) {
        let text = ask(command("ldd").arg(program)).unwrap_or_default();
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`
        let paths: BTreeSet<&str> =
            text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))).collect();
        for path in paths {
            self.file(Path::new(path), Path::new(path), 0o755);
        }
    }

    /// Writes the archive.
    pub fn write(&self, to: &Path) -> Result<()> {
        let file = fs::File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
        let mut out = Archive { out: BufWriter::new(file), at: 0, inode: 0 };
        for (path, entry) in &self.entries {
            let path = path.strip_prefix("/").unwrap_or(path);
            match entry {
                Entry::Directory => out.entry(path, 0o040_755, (0, 0), &[]),
                Entry::File { from, mode } => {
                    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
                    out.entry(path, 0o100_000 | mode, (0, 0), &bytes)
                }
                Entry::Text { text, mode } => out.entry(path, 0o100_000 | mode, (0, 0), text.as_bytes()),
                Entry::Link { to } => out.entry(path, 0o120_777, (0, 0), to.as_os_str().as_bytes()),
                Entry::Device { major, minor } => out.entry(path, 0o020_600, (*major, *minor), &[]),
            }
            .with_context(|| format!("cannot write {}", to.display()))?;
        }
        out.entry(Path::new("TRAILER!!!"), 0, (0, 0), &[])?;
        out.out.flush().with_context(|| format!("cannot write {}", to.display()))
    }
}

/// `/lib/x` is `/usr/lib/x`.
fn merged(path: &Path) -> PathBuf {
    let moved = MERGED.iter().find_map(|(name, to)| Some(Path::new(to).join(path.strip_prefix(name).ok()?)));
    moved.unwrap_or_else(|| path.to_owned())
}

/// Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
struct Archive<W> {
    out: W,
    at: usize,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn entry(&mut self, path: &Path, mode: u32, (major, minor): (u32, u32), body: &[u8]) -> std::io::Result<()> {
        self.inode += 1;
        let name = path.as_os_str().as_bytes();
        let size = u32::try_from(body.len()).map_err(std::io::Error::other)?;
        let fields = [
            self.inode,
            mode,
            // Owner, group.
            0,
            0,
            // Links, time.
            1,
            0,
            size,
            // The device that the file is on.
            0,
            0,
            major,
            minor,
            name.len() as u32 + 1,
            // No checksum.
            0,
        ];
        self.bytes(b"070701")?;
        for field in fields {
            self.bytes(format!("{field:08x}").as_bytes())?;
        }
        self.bytes(name)?;
        self.bytes(&[0])?;
        self.pad()?;
        self.bytes(body)?;
        self.pad()
    }

    fn bytes(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.at += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> std::io::Result<()> {
        let missing = self.at.next_multiple_of(4) - self.at;
        self.bytes(&[0; 3][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_what_the_kernel_reads() {
        let mut archive = Archive { out: Vec::new(), at: 0, inode: 0 };
        archive.entry(Path::new("a"), 0o100_644, (0, 0), b"hello").unwrap();
        let expected = "070701\
            00000001000081a400000000000000000000000100000000\
            0000000500000000000000000000000000000000\
            0000000200000000a\0hello\0\0\0";
        assert_eq!(String::from_utf8(archive.out).unwrap(), expected);
    }

    #[test]
    fn a_directory_comes_before_what_is_in_it() {
        let mut fs = Initramfs::new();
        fs.text("/lib/modules/x", String::new(), 0o644);
        let paths: Vec<_> = fs.entries.keys().filter(|path| path.starts_with("/usr/lib")).collect();
        assert_eq!(paths, ["/usr/lib", "/usr/lib/modules", "/usr/lib/modules/x"].map(Path::new));
    }
}
