//! A server in a container.

use std::mem::ManuallyDrop;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sqlx::{ConnectOptions, Connection};
use testcontainers::core::{IntoContainerPort, WaitFor};
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerAsync, GenericImage, ImageExt, TestcontainersError};
use tokio::runtime::Handle;

use crate::cluster::{Stop, free_port, random_password};
use crate::rundir::RunDir;
use crate::version::Major;
use crate::{Error, url};

/// What is taken when no version is asked for.
pub(crate) const NEWEST: Major = Major(18);

const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// The watchdog uses the `docker` program, so that has to answer too.
pub(crate) fn docker_answers() -> bool {
    let mut docker = Command::new("docker");
    docker
        .arg("version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    docker.status().is_ok_and(|status| status.success())
}

/// Its calls block on the runtime that they are made in, so they are made in threads that may block.
pub(crate) struct Container {
    /// Removed by the watchdog, which also comes when we are killed.
    container: ManuallyDrop<ContainerAsync<GenericImage>>,
    url: String,
}

impl Container {
    pub(crate) fn create(major: Major, dir: &RunDir, settings: &[(String, String)]) -> Result<Self, Error> {
        let port = free_port()?;
        let password = random_password();
        let mut command = vec![String::from("postgres")];
        for (name, value) in settings {
            command.extend([String::from("-c"), format!("{name}={value}")]);
        }
        let request = GenericImage::new("postgres", &major.to_string())
            .with_wait_for(WaitFor::message_on_stderr(
                "database system is ready to accept connections",
            ))
            // The same port after a restart, so that URLs stay true.
            .with_mapped_port(port, 5432.tcp())
            .with_env_var("POSTGRES_PASSWORD", password.as_str())
            .with_env_var("POSTGRES_INITDB_ARGS", "--locale=C --encoding=UTF8 --no-sync")
            .with_cmd(command);
        let container = Handle::current()
            .block_on(request.start())
            .map_err(error("start a container of postgres"))?;
        RunDir::write(&dir.path().join("container"), container.id())?;
        let container = Self {
            container: ManuallyDrop::new(container),
            url: url::local(port, &password),
        };
        container.await_connections()?;
        Ok(container)
    }

    pub(crate) fn url(&self) -> String {
        self.url.clone()
    }

    pub(crate) fn start(&self) -> Result<(), Error> {
        Handle::current()
            .block_on(self.container.start())
            .map_err(error("start the container"))?;
        self.await_connections()
    }

    pub(crate) fn stop(&self, how: Stop) -> Result<(), Error> {
        // The image's stop signal is SIGINT, a fast shutdown. Docker has no other, so immediate is by force.
        let seconds = match how {
            Stop::Fast => 60,
            Stop::Immediate => 0,
        };
        Handle::current()
            .block_on(self.container.stop_with_timeout(Some(seconds)))
            .map_err(error("stop the container"))
    }

    /// The image starts the server twice, and says that it is ready each time: only a connection tells.
    fn await_connections(&self) -> Result<(), Error> {
        let options: sqlx::postgres::PgConnectOptions =
            self.url.parse().map_err(Error::sql("read the container's URL"))?;
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let attempt = Handle::current().block_on(async { options.connect().await?.close().await });
            match attempt {
                Ok(()) => return Ok(()),
                Err(cause) if Instant::now() > deadline => {
                    return Err(Error::sql("connect to the container's server")(cause));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container")
            .field("id", &self.container.id())
            .finish_non_exhaustive()
    }
}

fn error(what: &'static str) -> impl FnOnce(TestcontainersError) -> Error {
    move |cause| Error::Container {
        what,
        message: cause.to_string(),
    }
}
