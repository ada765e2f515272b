//! A server of ours, whatever it runs in. All calls block.

use std::path::{Path, PathBuf};

use crate::Error;
use crate::cluster::{Cluster, End, Stop};
#[cfg(feature = "docker")]
use crate::container::Container;
use crate::provision::Provision;
use crate::rundir::RunDir;

#[derive(Debug)]
pub(crate) enum Engine {
    Cluster(Cluster),
    #[cfg(feature = "docker")]
    Container(Box<Container>),
}

impl Engine {
    /// On return the server takes connections.
    pub(crate) fn create(
        provision: Provision,
        dir: RunDir,
        settings: Vec<(String, String)>,
        environment: Vec<(String, String)>,
    ) -> Result<Self, Error> {
        match provision {
            Provision::Binaries(binaries, account) => {
                Cluster::create(binaries, account, dir, settings, environment).map(Self::Cluster)
            }
            #[cfg(feature = "docker")]
            Provision::Container(major) => Container::create(major, &dir, &settings)
                .map(|container| Self::Container(Box::new(container))),
        }
    }

    pub(crate) fn url(&self) -> String {
        match self {
            Self::Cluster(cluster) => cluster.url(),
            #[cfg(feature = "docker")]
            Self::Container(container) => container.url(),
        }
    }

    pub(crate) fn program(&self, name: &str) -> Option<PathBuf> {
        match self {
            Self::Cluster(cluster) => cluster.program(name),
            #[cfg(feature = "docker")]
            Self::Container(_) => None,
        }
    }

    pub(crate) fn start(&mut self) -> Result<(), Error> {
        match self {
            Self::Cluster(cluster) => cluster.start(),
            #[cfg(feature = "docker")]
            Self::Container(container) => container.start(),
        }
    }

    pub(crate) fn stop(&mut self, how: Stop) -> Result<(), Error> {
        match self {
            Self::Cluster(cluster) => cluster.stop(how),
            #[cfg(feature = "docker")]
            Self::Container(container) => container.stop(how),
        }
    }

    pub(crate) fn kill(&mut self) -> Result<(), Error> {
        match self {
            Self::Cluster(cluster) => {
                cluster.kill();
                Ok(())
            }
            #[cfg(feature = "docker")]
            Self::Container(container) => container.stop(Stop::Immediate),
        }
    }

    pub(crate) fn backup(&mut self) -> Result<PathBuf, Error> {
        match self {
            Self::Cluster(cluster) => cluster.backup(),
            #[cfg(feature = "docker")]
            Self::Container(_) => Err(Error::NotPrivate { operation: "back up" }),
        }
    }

    /// One in `dir` that receives, through this port, what this one writes.
    pub(crate) fn standby(&self, dir: RunDir, through: u16) -> Result<Self, Error> {
        match self {
            Self::Cluster(cluster) => cluster.standby(dir, through).map(Self::Cluster),
            #[cfg(feature = "docker")]
            Self::Container(_) => {
                let _ = (dir, through);
                Err(Error::NotPrivate {
                    operation: "make a standby of",
                })
            }
        }
    }

    pub(crate) fn recover(&mut self, backup: &Path, end: &End) -> Result<(), Error> {
        match self {
            Self::Cluster(cluster) => cluster.recover(backup, end),
            #[cfg(feature = "docker")]
            Self::Container(_) => {
                let _ = (backup, end);
                Err(Error::NotPrivate { operation: "recover" })
            }
        }
    }

    /// The server outlives this process; its watchdog ends it.
    pub(crate) fn leave(self) {
        match self {
            Self::Cluster(cluster) => cluster.leave(),
            #[cfg(feature = "docker")]
            Self::Container(_) => {}
        }
    }
}
