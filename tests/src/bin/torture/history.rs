//! The history: what the processes did, each in a file of its own, outside the database that is tortured.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::clock;

/// A line of a history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub(crate) enum Line {
    /// A producer is about to commit this message.
    Publish {
        at: u64,
        tx: u64,
        id: Uuid,
        topic: String,
        key: String,
        n: i64,
    },
    /// What became of a producer's transaction, as far as it knows.
    Ended { tx: u64, how: Ended },
    /// A handler begins.
    Start {
        at: u64,
        run: u64,
        group: String,
        id: Uuid,
        key: String,
        n: i64,
        attempt: u32,
    },
    /// A handler ends. A run without one was cut short with its process.
    End { at: u64, run: u64, how: Outcome },
    /// Something was done to the system.
    Fault { at: u64, kind: String },
    /// An instance was stopped by a signal from here to there.
    Frozen { instance: String, from: u64, to: u64 },
    /// What an instance sent or was sent was swallowed from here to there.
    Blind { instance: String, from: u64, to: u64 },
    /// The database went back to an earlier state: from here on the old one was ended, from there on this one was within reach.
    CutBack {
        from: u64,
        to: u64,
        /// The messages that it has.
        kept: Vec<Uuid>,
        /// The dead letters that the old one had in the end, by group.
        dead: Vec<(String, Uuid)>,
    },
    /// The server was down from here to there.
    Outage { from: u64, to: u64 },
    /// An instance was killed.
    Killed { instance: String, at: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ended {
    Committed,
    Aborted,
    /// The answer to the commit was lost.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Ok,
    Failed,
    /// It panicked, took too long, or was cancelled.
    Dropped,
}

/// Writes a history. Every line is one write, so a killed process loses at most the line that it was writing.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    file: Arc<File>,
    runs: Arc<AtomicU64>,
}

const EXTENSION: &str = "history";

impl Log {
    pub(crate) fn create(folder: &Path, instance: &str) -> anyhow::Result<Self> {
        let path = path_of(folder, instance);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self {
            file: Arc::new(file),
            runs: Arc::default(),
        })
    }

    /// A history that cannot be written is worth nothing, so the process ends.
    pub(crate) fn write(&self, line: &Line) {
        let written = serde_json::to_vec(line)
            .map_err(std::io::Error::from)
            .and_then(|mut text| {
                text.push(b'\n');
                (&*self.file).write_all(&text)
            });
        if let Err(error) = written {
            eprintln!("error: cannot write the history: {error}");
            std::process::exit(2);
        }
    }

    pub(crate) fn fault(&self, kind: &str) {
        self.write(&Line::Fault {
            at: clock::now(),
            kind: kind.to_owned(),
        });
    }

    pub(crate) fn next_run(&self) -> u64 {
        self.runs.fetch_add(1, Ordering::Relaxed)
    }
}

fn path_of(folder: &Path, instance: &str) -> PathBuf {
    folder.join(format!("{instance}.{EXTENSION}"))
}

/// All histories of a folder, by instance.
pub(crate) fn read_all(folder: &Path) -> anyhow::Result<Vec<(String, Vec<Line>)>> {
    let mut histories = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != EXTENSION) {
            continue;
        }
        let name = path
            .file_stem()
            .map(|stem| stem.to_string_lossy().into_owned())
            .unwrap_or_default();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let lines: Vec<&str> = text.lines().collect();
        let mut parsed = Vec::with_capacity(lines.len());
        for (number, line) in lines.iter().enumerate() {
            match serde_json::from_str(line) {
                Ok(line) => parsed.push(line),
                // The process was killed while it wrote.
                Err(_) if number + 1 == lines.len() => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("line {} of {}", number + 1, path.display()));
                }
            }
        }
        histories.push((name, parsed));
    }
    histories.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(histories)
}
