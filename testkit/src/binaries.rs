//! PostgreSQL's programs on this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::account::Account;
use crate::version::Major;

/// Where packagers put them; `*` is any name.
const USUAL: &[&str] = &[
    "/usr/lib/postgresql/*/bin",
    "/usr/lib/postgresql*/bin",
    "/usr/libexec/postgresql*",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/home/linuxbrew/.linuxbrew/opt/postgresql*/bin",
    "/opt/local/lib/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/Library/PostgreSQL/*/bin",
];

/// A folder with the server's programs, which the server's user may run.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    folder: PathBuf,
    pub(crate) major: Major,
}

impl Binaries {
    /// `None` where the programs are missing, or do not run.
    pub(crate) fn in_folder(folder: &Path, account: Account) -> Option<Self> {
        if !folder.join("postgres").exists() || !folder.join("initdb").exists() {
            return None;
        }
        let output = account
            .command(folder.join("postgres"))
            .arg("--version")
            .current_dir("/")
            .output()
            .ok()?;
        let major = Major::of_program(&String::from_utf8_lossy(&output.stdout))?;
        Some(Self {
            folder: folder.to_owned(),
            major,
        })
    }

    /// The newest on this machine that will do.
    pub(crate) fn on_this_machine(wanted: Option<Major>, account: Account) -> Option<Self> {
        folders()
            .iter()
            .filter_map(|folder| Self::in_folder(folder, account))
            .filter(|binaries| binaries.major.serves(wanted))
            // The first of equals: what PATH names goes before the usual folders.
            .reduce(|best, next| if next.major > best.major { next } else { best })
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

fn folders() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(pg_config_folder());
    folders.extend(USUAL.iter().flat_map(|pattern| matching(pattern)));
    // A link such as /opt/homebrew/bin/postgres leads to the folder that has all the programs.
    let mut real: Vec<PathBuf> = Vec::new();
    for folder in folders {
        let Ok(program) = folder.join("postgres").canonicalize() else {
            continue;
        };
        if let Some(home) = program
            .parent()
            .filter(|home| !real.iter().any(|known| known == home))
        {
            real.push(home.to_owned());
        }
    }
    real
}

fn pg_config_folder() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").output().ok()?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}

/// The folders that fit a pattern with `*` in one of its names.
fn matching(pattern: &str) -> Vec<PathBuf> {
    let names: Vec<&str> = pattern.split('/').collect();
    let Some(starred) = names.iter().position(|name| name.contains('*')) else {
        return vec![PathBuf::from(pattern)];
    };
    let (before, after) = names[starred].split_once('*').unwrap_or((names[starred], ""));
    let Ok(entries) = std::fs::read_dir(names[..starred].join("/")) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok())
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.len() >= before.len() + after.len() && name.starts_with(before) && name.ends_with(after)
        })
        .map(|entry| entry.path().join(names[starred + 1..].join("/")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_folder() {
        let root = std::env::temp_dir().join(format!("postbox-binaries-{}", std::process::id()));
        for version in ["pgsql-15", "pgsql-18", "other"] {
            std::fs::create_dir_all(root.join(version).join("bin")).expect("folder");
        }
        let mut found = matching(&format!("{}/pgsql-*/bin", root.display()));
        found.sort();
        assert_eq!(found, [root.join("pgsql-15/bin"), root.join("pgsql-18/bin")]);
        std::fs::remove_dir_all(root).expect("removed");
    }
}
