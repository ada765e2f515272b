//! The folders that servers live in.

pub(crate) mod watchdog;

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::account::Account;
use crate::{Error, processes};

/// The folder of one server: its data, its socket, its log, and notes for the other processes.
#[derive(Clone, Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
}

impl RunDir {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// The server's user may pass through, and owns what it writes.
    pub(crate) fn create(path: PathBuf, account: Account) -> Result<Self, Error> {
        make_folder(&path)?;
        let dir = Self { path };
        for folder in [dir.data(), dir.socket()] {
            make_folder(&folder)?;
            account.give(&folder)?;
        }
        make_folder(&dir.users())?;
        Ok(dir)
    }

    /// For a server of this process alone.
    pub(crate) fn private(account: Account) -> Result<Self, Error> {
        let root = root(account)?;
        remove_leftovers(&root);
        let name = format!("private-{}-{}", std::process::id(), short_id());
        Self::create(root.join(name), account)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join("socket")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// One file for each process that uses the server, named by its number.
    pub(crate) fn users(&self) -> PathBuf {
        self.path.join("users")
    }

    /// The watchdog's number.
    pub(crate) fn watchdog(&self) -> PathBuf {
        self.path.join("watchdog")
    }

    /// There while the watchdog is about to stop the server.
    pub(crate) fn closing(&self) -> PathBuf {
        self.path.join("closing")
    }

    /// How to connect; there once the server is ready.
    pub(crate) fn url(&self) -> PathBuf {
        self.path.join("url")
    }

    pub(crate) fn read(file: &Path) -> Option<String> {
        fs::read_to_string(file).ok().map(|text| text.trim().to_owned())
    }

    /// At once and whole, and for our eyes only.
    pub(crate) fn write(file: &Path, text: &str) -> Result<(), Error> {
        let what = || format!("write {}", file.display());
        let part = file.with_extension(format!("part-{}", std::process::id()));
        fs::write(&part, text).map_err(Error::io(what()))?;
        fs::set_permissions(&part, PermissionsExt::from_mode(0o600)).map_err(Error::io(what()))?;
        fs::rename(&part, file).map_err(Error::io(what()))
    }

    pub(crate) fn has_watchdog(&self) -> bool {
        Self::read(&self.watchdog())
            .and_then(|pid| pid.parse().ok())
            .is_some_and(|pid| processes::mentions(pid, &self.path.to_string_lossy()))
    }
}

/// The folder of this user's servers.
pub(crate) fn root(account: Account) -> Result<PathBuf, Error> {
    let mut places = vec![std::env::temp_dir()];
    if let Account::Unprivileged { .. } = account {
        places.extend(["/tmp", "/var/tmp"].map(PathBuf::from));
        places.retain(|place| passable(place));
    }
    // macOS's /tmp is a link, and the server knows itself by the real name.
    let place = places.swap_remove(0);
    let place = place
        .canonicalize()
        .map_err(Error::io(format!("find {}", place.display())))?;
    let us = rustix::process::geteuid().as_raw();
    let root = place.join(format!("postbox-testkit-{us}"));
    if let Err(error) = make_folder(&root) {
        // Anybody may create a folder of that name where everybody keeps temporary files.
        match fs::symlink_metadata(&root) {
            Ok(metadata) if metadata.is_dir() && metadata.uid() == us => {}
            Ok(_) => return Err(Error::NotOurs { path: root }),
            Err(_) => return Err(error),
        }
    }
    Ok(root)
}

/// Whether everybody may reach what is in that folder.
fn passable(folder: &Path) -> bool {
    let Ok(folder) = folder.canonicalize() else {
        return false;
    };
    folder
        .ancestors()
        .all(|part| fs::metadata(part).is_ok_and(|metadata| metadata.mode() & 0o001 != 0))
}

fn make_folder(path: &Path) -> Result<(), Error> {
    // Others may pass through to what is theirs, and read nothing.
    let what = || format!("create {}", path.display());
    DirBuilder::new()
        .mode(0o711)
        .create(path)
        .map_err(Error::io(what()))?;
    // Once more, because a umask may have taken some.
    fs::set_permissions(path, PermissionsExt::from_mode(0o711)).map_err(Error::io(what()))
}

/// What private servers left when the machine went down: neither owner nor watchdog lives.
fn remove_leftovers(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.filter_map(Result::ok) {
        let dir = RunDir::at(entry.path());
        if abandoned(&entry.file_name().to_string_lossy()) && !dir.has_watchdog() {
            watchdog::tear_down(&dir);
        }
    }
}

/// By its name: `private-<owner>-…`, or `….ending.<who removes it>`.
fn abandoned(name: &str) -> bool {
    let process = match name.rsplit_once(".ending.") {
        Some((_, remover)) => Some(remover),
        None => name
            .strip_prefix("private-")
            .and_then(|rest| rest.split('-').next()),
    };
    process
        .and_then(|pid| pid.parse().ok())
        .is_some_and(|pid| !processes::alive(pid))
}

/// No two alike among the processes of this machine.
fn short_id() -> String {
    let id = uuid::Uuid::now_v7().simple().to_string();
    id[id.len() - 8..].to_owned()
}
