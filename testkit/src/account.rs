//! The user that servers run as: ourselves, or, because PostgreSQL refuses root, somebody unprivileged.

use std::ffi::OsStr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::Error;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Account {
    Ourselves,
    Unprivileged { uid: u32, gid: u32 },
}

impl Account {
    pub(crate) fn for_servers() -> Result<Self, Error> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self::Ourselves);
        }
        ["postgres", "nobody"]
            .into_iter()
            .find_map(Self::named)
            .ok_or(Error::NoUnprivilegedUser)
    }

    fn named(name: &str) -> Option<Self> {
        Some(Self::Unprivileged {
            uid: id("-u", name)?,
            gid: id("-g", name)?,
        })
    }

    /// A command that runs as this user and without our `PG…` variables.
    pub(crate) fn command(self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        if let Self::Unprivileged { uid, gid } = self {
            command.uid(uid).gid(gid);
        }
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        // Messages that we read are in English then, and macOS needs it for a single-threaded postmaster.
        command.env("LC_ALL", "C");
        command
    }

    /// Makes `path` this user's, and nobody else's.
    pub(crate) fn give(self, path: &Path) -> Result<(), Error> {
        let what = || format!("give {} to the server's user", path.display());
        if let Self::Unprivileged { uid, gid } = self {
            chown(path, Some(uid), Some(gid)).map_err(Error::io(what()))?;
        }
        let mode = if path.is_dir() { 0o700 } else { 0o600 };
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).map_err(Error::io(what()))
    }
}

/// `id` asks every source of users, not just /etc/passwd.
fn id(what: &str, name: &str) -> Option<u32> {
    let output = Command::new("id").args([what, name]).output().ok()?;
    // macOS writes the 32 bits of `nobody` as -2.
    let number: i64 = String::from_utf8(output.stdout).ok()?.trim().parse().ok()?;
    Some(number as u32).filter(|&id| id != 0)
}
