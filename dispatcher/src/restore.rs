//! After a logical restore into another cluster: makes the transaction ids in the schema that cluster's own.
//!
//! The work is the SQL function `postbox.rebase`; why it is right is in docs/internals/restore.md.

use postbox::__private::Transaction;
use serde::Serialize;
use sqlx::{FromRow, PgPool};
use tracing::{info, warn};

/// What a rebase did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, FromRow)]
#[non_exhaustive]
pub struct Rebased {
    /// Why it was needed, in words.
    pub reason: String,
    /// Messages that keep their offsets.
    pub sequenced: i64,
    /// Messages that have no offset yet: the next step of a dispatcher gives them theirs.
    pub unsequenced: i64,
    /// Lanes of instances that do not live here, which are free now.
    pub freed_lanes: i64,
}

const FOREIGN: &str = "SELECT postbox.foreign_xids()";

/// It has no row to show where nothing was to be done.
const REBASE: &str =
    "SELECT reason, sequenced, unsequenced, freed_lanes FROM postbox.rebase($1) WHERE reason IS NOT NULL";

/// Whatever the database defaults to: its snapshot must be newer than its lock.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

/// Why the transaction ids in the schema are not of this cluster; `None`: they are, and no rebase is needed.
///
/// # Errors
///
/// The database's.
pub async fn is_needed(pool: &PgPool) -> Result<Option<String>, postbox::Error> {
    Ok(sqlx::query_scalar(FOREIGN).fetch_one(pool).await?)
}

/// Makes the transaction ids in the schema this cluster's own; `None` if they are already and it was not told to do it all the same,
/// which is harmless.
///
/// One transaction, which rewrites all messages and segments. Publishing does not wait for it; dispatchers do. Any number may call it
/// at once, and one does the work.
///
/// # Errors
///
/// The database's; SQLSTATE `PB003`: the restore has not ended. It needs the rights of the schema's owner.
pub async fn rebase(pool: &PgPool, even_if_not_needed: bool) -> Result<Option<Rebased>, postbox::Error> {
    let mut tx = Transaction::begin(pool, BEGIN).await?;
    let rebased = sqlx::query_as(REBASE)
        .bind(even_if_not_needed)
        .fetch_optional(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(rebased)
}

/// For a dispatcher that connects.
pub(crate) async fn rebase_if_restored(pool: &PgPool) -> Result<(), postbox::Error> {
    let Some(reason) = is_needed(pool).await? else {
        return Ok(());
    };
    warn!(
        reason,
        "this database was restored from another cluster; giving its messages this cluster's transaction ids"
    );
    match rebase(pool, false).await? {
        Some(done) => warn!(
            sequenced = done.sequenced,
            unsequenced = done.unsequenced,
            freed_lanes = done.freed_lanes,
            "rebased: messages that were in order keep their offsets, the others come next"
        ),
        None => info!("another dispatcher has rebased it meanwhile"),
    }
    Ok(())
}
