//! Postbox's schema, and what tells one schema from another.

use sqlx::PgPool;

use crate::Error;

pub(crate) async fn migrate(pool: &PgPool) -> Result<(), Error> {
    postbox::migrate(pool)
        .await
        .map(drop)
        .map_err(|source| Error::Migrate {
            source: Box::new(source),
        })
}

/// Changes with the migrations. Fit for the name of a database, which has at most 63 characters.
pub(crate) fn fingerprint() -> String {
    let fingerprint = postbox::schema_fingerprint();
    let letters = fingerprint.chars().filter(char::is_ascii_alphanumeric).take(32);
    letters.map(|letter| letter.to_ascii_lowercase()).collect()
}
