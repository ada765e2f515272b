//! Postbox's schema, and what tells one schema from another.

use sqlx::PgPool;

use crate::Error;

pub(crate) async fn migrate(pool: &PgPool) -> Result<(), Error> {
    sqlx::query("create schema postbox")
        .execute(pool)
        .await
        .map(drop)
        .map_err(|source| Error::Migrate {
            source: source.into(),
        })
}

/// Changes with the migrations. Letters and digits only, and short enough for a database's name.
pub(crate) fn fingerprint() -> String {
    String::from("stub")
}
