//! Databases with the migrations of the service under test.

use std::hash::{DefaultHasher, Hash, Hasher};

use sqlx::migrate::Migrator;

use crate::{Error, TestDatabase, TestPostgres, template};

impl TestDatabase {
    /// A database with Postbox's schema and these migrations of the service, in the [shared](TestPostgres::shared) server.
    ///
    /// They are applied once to a template, after Postbox's, for each version of both; this database is a copy of that. The table in which sqlx
    /// keeps what it has applied is in it, so that a service which migrates at its start finds nothing to do.
    ///
    /// # Errors
    /// Where no server can be had, with all that was tried; where a migration fails.
    pub async fn migrated(migrator: &Migrator) -> Result<Self, Error> {
        let server = TestPostgres::shared().await?;
        let name = format!("service_{:016x}", fingerprint(migrator));
        Self::copied_in(server, async |connection, server| {
            template::ensure_more(connection, server, &name, async |pool| {
                migrator
                    .run(pool)
                    .await
                    .map_err(|source| Error::Migrations { source })
            })
            .await
        })
        .await
    }
}

/// Changes with the migrations. The same for the same compiler, which is enough.
fn fingerprint(migrator: &Migrator) -> u64 {
    let mut hasher = DefaultHasher::new();
    for migration in migrator.iter() {
        migration.version.hash(&mut hasher);
        migration.checksum.hash(&mut hasher);
    }
    hasher.finish()
}
