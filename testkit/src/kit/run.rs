//! Running a test: its runtime, its kit, and that nothing of them is left.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use sqlx::migrate::Migrator;

use super::Kit;
use crate::Error;

/// Beside the test's own thread, so that a handler that blocks its thread for a while does not stop everything, and what races in a service may race here.
const THREADS: usize = 2;

/// For what blocks a thread when the test ends; the rest is gone at once.
const STOPPING: Duration = Duration::from_secs(2);

/// What `#[postbox_testkit::test(…)]` says.
#[derive(Debug, Default, Clone, Copy)]
pub struct Options {
    migrator: Option<&'static Migrator>,
}

impl Options {
    /// With the service's own migrations.
    #[must_use]
    pub fn migrator(self, migrator: &'static Migrator) -> Self {
        Self {
            migrator: Some(migrator),
        }
    }

    async fn kit(self) -> Result<Kit, Error> {
        match self.migrator {
            Some(migrator) => Kit::migrated(migrator).await,
            None => Kit::new().await,
        }
    }
}

/// Runs a test with a kit of its own. Whether it returns or panics, nothing of it runs any more and its database is gone when this returns.
///
/// # Panics
/// With the test's panic; and where there is no database for it.
pub fn run<T, F: Future<Output = T>>(options: Options, test: impl FnOnce(Kit) -> F) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("postbox-test")
        .enable_all()
        .build()
        .expect("a runtime starts");
    let kit = match runtime.block_on(options.kit()) {
        Ok(kit) => kit,
        Err(error) => panic!("the test has no database: {error}"),
    };
    let ours = kit.clone();
    let outcome = catch_unwind(AssertUnwindSafe(|| runtime.block_on(test(kit))));
    ours.stop();
    // Tasks go at once, wherever they wait; so do the connections, and with them what was not committed.
    runtime.shutdown_timeout(STOPPING);
    drop(ours);
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}
