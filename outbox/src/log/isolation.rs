//! Which row it is that cannot be read, when reading many has failed.
//!
//! A row may be damaged, too large for one message of the protocol, or hold text that cannot be converted. Then the server refuses the whole
//! statement, and halves of it are asked for until the row is alone.

use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{Filters, Request, StoredMessage, Types, Wanted};
use crate::error::{DatabaseError, Error, Result};
use crate::id::MessageId;

/// Columns that are stored in the row itself, and the size of the payload, which need not be read for that.
const IN_THE_ROW: &str =
    "SELECT id, octet_length(payload) FROM postbox.outbox WHERE slot = $1 AND xid = $2 AND seq = $3";

/// A payload of so many bytes may by itself be too much for a server's memory or a statement's time; a smaller one is not to blame.
const GIANT: i32 = 16 * 1024 * 1024;

/// Whether a row may be why a statement failed: class 22, data exception; 54, program limit exceeded; XX, damaged; or it was too much (53200, out of
/// memory; 57014, timed out).
pub(super) fn is_of_a_row(code: Option<&str>) -> bool {
    is_by_content(code) || is_by_size(code)
}

fn is_by_content(code: Option<&str>) -> bool {
    code.is_some_and(|code| ["22", "54", "XX"].iter().any(|class| code.starts_with(class)))
}

fn is_by_size(code: Option<&str>) -> bool {
    code.is_some_and(|code| code == "53200" || code == "57014")
}

/// Reads halves of what is wanted until those are alone that cannot be read; these are entered with the reason.
pub(super) async fn one_by_one(
    connection: &mut PgConnection,
    topic: &str,
    filters: &Filters,
    request: &Request,
    types: &mut Types,
    found: &mut Vec<StoredMessage>,
) -> Result<()> {
    let mut parts = halves(&request.entries);
    while let Some(part) = parts.pop() {
        let start = found.len();
        let error = match request
            .fetch_some(connection, topic, filters, part, types, found)
            .await
        {
            Err(Error::Database(error)) if is_of_a_row(error.code()) => {
                found.truncate(start);
                error
            }
            read => {
                read?;
                continue;
            }
        };
        if part.len() > 1 {
            parts.extend(halves(part));
            continue;
        }
        for (address, offset, key_hash) in part {
            let row = sqlx::query(IN_THE_ROW)
                .bind(request.slot)
                .bind(address.xid)
                .bind(address.seq)
                .fetch_optional(&mut *connection)
                .await;
            // Where not even that can be read the page is damaged.
            let (id, size) = match row {
                Ok(Some(row)) => (row.try_get::<Uuid, _>(0)?, row.try_get::<i32, _>(1)?),
                Ok(None) => continue,
                Err(other) => match DatabaseError::from(other) {
                    other if is_by_content(other.code()) => (Uuid::nil(), 0),
                    other => return Err(Error::Database(other)),
                },
            };
            if is_by_size(error.code()) && size < GIANT {
                return Err(Error::Database(error));
            }
            let (id, why) = (MessageId::from(id), error.to_string());
            found.push(StoredMessage::unread(id, *offset, address.seq, *key_hash, why));
        }
    }
    Ok(())
}

/// The second one first, so that the first is popped first.
fn halves(entries: &[Wanted]) -> Vec<&[Wanted]> {
    let (first, second) = entries.split_at(entries.len() / 2);
    [second, first]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect()
}
