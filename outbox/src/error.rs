//! What can go wrong when publishing, migrating or reading the log.

#[cfg(feature = "cron")]
mod cron;
mod database;

#[cfg(feature = "cron")]
pub use self::cron::CronError;
pub use self::database::DatabaseError;
use crate::message::{DecodeError, EncodeError};

/// An error of Postbox. Each says what failed and what to do about it.
///
/// Bad input is refused before the database sees it, so a transaction is still usable after every variant but
/// [`Database`](Error::Database).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The topic is empty, too long, or has a character that is not allowed.
    #[error("topic {0:?} is not allowed: a topic is 1 to 255 characters of A-Z a-z 0-9 . _ - : /")]
    InvalidTopic(String),
    /// The message type is empty, too long, or has a character that is not allowed.
    #[error("type {0:?} is not allowed: a message type is 1 to 255 characters of A-Z a-z 0-9 . _ - : /")]
    InvalidType(String),
    /// The key is longer than 1,024 bytes.
    #[error("the key has {0} bytes: a key has at most 1,024 bytes, so use a digest of it as the key")]
    KeyTooLong(usize),
    /// A text holds the character U+0000, which PostgreSQL cannot store.
    #[error("the {field} contains the character U+0000, which PostgreSQL cannot store as text")]
    NulCharacter {
        /// Which one.
        field: &'static str,
    },
    /// A header's name is not allowed.
    #[error(
        "header name {0:?} is not allowed: a name is 1 to 128 characters of A-Z a-z 0-9 . _ - and does not begin \
         with \"postbox-\", which is reserved"
    )]
    InvalidHeaderName(String),
    /// All headers together are larger than 16,384 bytes.
    #[error(
        "the headers have {0} bytes as JSON: at most 16,384 are allowed, so move large values into the payload"
    )]
    HeadersTooLarge(usize),
    /// The headers in a row are no JSON object.
    #[error("the headers are no JSON object: they are an object of names and values")]
    HeadersNoObject,
    /// The content type is no media type.
    #[error(
        "content type {0:?} is not allowed: it is 1 to 255 visible ASCII characters such as application/json"
    )]
    InvalidContentType(String),
    /// The payload is larger than the limit.
    #[error(
        "the payload has {size} bytes and the limit is {limit}: publish a reference to it, or raise the limit with \
         postbox::set_payload_limit"
    )]
    PayloadTooLarge {
        /// Its size in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The deduplication key is empty or longer than 1,024 bytes.
    #[error("the deduplication key has {0} bytes: it has 1 to 1,024 bytes")]
    InvalidDedupKey(usize),
    /// The deduplication window is zero or longer than 10 years.
    #[error("the deduplication window is {0:?}: it is more than zero and at most 10 years")]
    InvalidDedupWindow(std::time::Duration),
    /// There is a deduplication window and no key.
    #[error("the message has a deduplication window and no key: add Outgoing::dedup_key")]
    DedupWindowWithoutKey,
    /// A setting is outside its range.
    #[error("{setting} is {value}: {range}")]
    Setting {
        /// The setting: the method that sets it.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        range: &'static str,
    },
    /// The delay is longer than 10,000 years.
    #[error("the delay is {0:?}: it is at most 10,000 years")]
    InvalidDelay(std::time::Duration),
    /// The lifetime is zero or longer than 10,000 years.
    #[error("the message expires in {0:?}: a lifetime is more than zero and at most 10,000 years")]
    InvalidLifetime(std::time::Duration),
    /// A cron expression, its time zone or its name is wrong.
    #[cfg(feature = "cron")]
    #[error(transparent)]
    Cron(#[from] CronError),
    /// A message of a batch was refused; none of the batch was published.
    #[error("message {index} of the batch (counted from 0): {source}")]
    InBatch {
        /// Its place in the batch, from 0.
        index: usize,
        /// Why.
        source: Box<Error>,
    },
    /// The payload could not be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The payload could not be decoded.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// No transaction is open on the connection.
    #[error(
        "no transaction is open on this connection: begin one, since a message is published with the data that it is about"
    )]
    NoTransaction,
    /// A segment of the log does not fit together.
    #[error(
        "the segment of topic {topic:?} at offset {base} is damaged: its lists are not of one length; the messages are still in postbox.outbox"
    )]
    DamagedSegment {
        /// Its topic.
        topic: String,
        /// Its first offset.
        base: i64,
    },
    /// The database has another encoding than UTF8.
    #[error(
        "the database {database:?} has the encoding {encoding} and Postbox needs UTF8, since keys, headers and errors may hold any character: create one with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
    )]
    Encoding {
        /// Name of the database.
        database: String,
        /// Its encoding, as PostgreSQL calls it.
        encoding: String,
    },
    /// The database has no Postbox schema.
    #[error(
        "the database {database:?} has no Postbox schema: run `postbox migrate` or call postbox::migrate"
    )]
    SchemaMissing {
        /// Name of the database.
        database: String,
    },
    /// The schema is older than this program needs.
    #[error(
        "the Postbox schema is at version {found} and this program needs {needed}: run `postbox migrate` or call postbox::migrate"
    )]
    SchemaOlder {
        /// The database's version.
        found: i32,
        /// The version this program needs.
        needed: i32,
    },
    /// The schema was migrated by a newer program, and this one does not work with it.
    #[error(
        "the Postbox schema is at version {found}, which no longer works with programs that know only {known}: upgrade this program; the database was left as it is"
    )]
    SchemaNewer {
        /// The database's version.
        found: i32,
        /// The newest version this program knows.
        known: i32,
    },
    /// A migration that was applied is not the one this program has under its number.
    #[error(
        "migration {version} ({name}) was applied in another form than this program has it: the program and the database come from different builds"
    )]
    MigrationChanged {
        /// Its number.
        version: i32,
        /// Its name.
        name: String,
    },
    /// The role lacks a privilege that migrating needs.
    #[error(
        "role {role:?} may not {} the schema postbox of database {database:?}: {}",
        if *.exists { "create and use what is in" } else { "create" },
        if *.exists {
            format!("as its owner, GRANT USAGE, CREATE ON SCHEMA postbox TO \"{role}\", or migrate as the role that did so first")
        } else {
            format!("GRANT CREATE ON DATABASE \"{database}\" TO \"{role}\", or have an administrator CREATE SCHEMA postbox AUTHORIZATION \"{role}\"")
        }
    )]
    MayNotMigrate {
        /// The role.
        role: String,
        /// The database.
        database: String,
        /// Whether there is a schema.
        exists: bool,
    },
    /// What ran in the background has ended by itself.
    #[error("it ended by itself: {0}; start it again")]
    Ended(String),
    /// PostgreSQL or the connection reported an error; the transaction is no longer usable.
    #[error("database: {0}")]
    Database(#[source] DatabaseError),
}

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
