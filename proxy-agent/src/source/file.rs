//! One file that is not of objects: the configuration, followed as the directory of objects is.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tokio::sync::mpsc;
use tracing::warn;

use super::directory::{LOOK, SETTLE, watch_tree};

/// A file and what it said last.
pub struct File {
    path: PathBuf,
    text: String,
    /// Why it could not be read, if that was said.
    unreadable: Option<String>,
}

impl File {
    /// `text`: what it said when it was read first.
    pub fn new(path: &Path, text: String) -> Self {
        Self { path: path.to_owned(), text, unreadable: None }
    }

    /// Waits until it says something else, and rests. A file that is gone or cannot be read says what it said before. Links are followed:
    /// a mounted ConfigMap changes by one that is swapped.
    pub async fn changed(&mut self) -> String {
        let (wake, mut woken) = mpsc::channel(1);
        // What is swapped is the file's directory; a watch of the file itself would see the old one go and nothing more.
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let _watcher = watch_tree(directory, notify::RecursiveMode::NonRecursive, wake);
        loop {
            if let Some(text) = self.look() {
                tokio::time::sleep(SETTLE).await;
                if self.look().as_ref() == Some(&text) {
                    self.text.clone_from(&text);
                    return text;
                }
                continue;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {},
                // Without a watcher nobody wakes.
                Some(()) = woken.recv() => {},
            }
        }
    }

    /// What it says now, if that is something else. It is small, and read in one go.
    fn look(&mut self) -> Option<String> {
        match fs::read_to_string(&self.path) {
            Ok(text) => {
                self.unreadable = None;
                (text != self.text).then_some(text)
            }
            Err(error) => {
                self.say(&error);
                None
            }
        }
    }

    fn say(&mut self, error: &io::Error) {
        let why = error.to_string();
        if self.unreadable.as_ref() != Some(&why) {
            warn!("cannot read {}: {why}; what it said before stays in force", self.path.display());
            self.unreadable = Some(why);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, time::Duration};

    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_mounted_config_map_is_followed_and_what_is_gone_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let path = root.join("config.conf");
        for (state, text) in [("..1", "a"), ("..2", "b"), ("..3", "c")] {
            fs::create_dir(root.join(state)).unwrap();
            fs::write(root.join(state).join("config.conf"), text).unwrap();
        }
        symlink("..1", root.join("..data")).unwrap();
        symlink("..data/config.conf", &path).unwrap();
        let mut file = File::new(&path, "a".into());
        let swap = |to: &str| {
            symlink(to, root.join("..data_tmp")).unwrap();
            fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
        };
        swap("..2");
        assert_eq!(timeout(PATIENCE, file.changed()).await.unwrap(), "b");
        assert!(timeout(Duration::from_secs(2), file.changed()).await.is_err(), "it rests");

        fs::remove_file(&path).unwrap();
        assert!(timeout(Duration::from_secs(2), file.changed()).await.is_err(), "gone");
        symlink("..data/config.conf", &path).unwrap();
        swap("..3");
        assert_eq!(timeout(PATIENCE, file.changed()).await.unwrap(), "c");
    }
}
