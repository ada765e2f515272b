//! What a message may hold. The same rules are in SQL (`postbox.broken_rule`); a test compares the two.
//!
//! A plain `INSERT` is checked by nobody, since that would cost each publisher more than the insert. So what it let by is found later: a topic by the
//! sequencer, the rest by who reads the message ([`broken_by`]).

use crate::error::{Error, Result};
#[cfg(feature = "sqlx")]
use crate::headers::Headers;
#[cfg(feature = "sqlx")]
use crate::reserved::{self, dead_letters};

/// Longest topic and message type, in characters.
pub const MAX_NAME: usize = 255;
/// Longest key and deduplication key, in bytes.
pub const MAX_KEY: usize = 1024;
/// Largest headers, in bytes of their JSON.
pub const MAX_HEADERS: usize = 16 * 1024;
/// Longest header name, in characters.
pub const MAX_HEADER_NAME: usize = 128;

/// Names that begin so are for Postbox alone.
const RESERVED: &str = "postbox-";
/// What Postbox itself adds.
#[cfg(feature = "sqlx")]
const ITS_OWN: [&str; 12] = [
    reserved::CRON,
    dead_letters::ATTEMPTS,
    dead_letters::GROUP,
    dead_letters::HALTED,
    dead_letters::ID,
    dead_letters::OFFSET,
    dead_letters::PUBLISHED_AT,
    dead_letters::REASON,
    dead_letters::TOPIC,
    reserved::SCHEDULED_AT,
    reserved::REDRIVEN,
    reserved::REPLAYED,
];

/// Whether a text may name a topic, a message type or a consumer group.
pub fn is_name(text: &str) -> bool {
    (1..=MAX_NAME).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-:/".contains(&byte))
}

pub(crate) fn check_type(message_type: &str) -> Result<()> {
    match is_name(message_type) {
        true => Ok(()),
        false => Err(Error::InvalidType(message_type.to_owned())),
    }
}

pub(crate) fn check_key(key: &str) -> Result<()> {
    match key.len() {
        ..=MAX_KEY => Ok(()),
        bytes => Err(Error::KeyTooLong(bytes)),
    }
}

pub(crate) fn check_content_type(text: &str) -> Result<()> {
    let allowed = (1..=MAX_NAME).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    match allowed {
        true => Ok(()),
        false => Err(Error::InvalidContentType(text.to_owned())),
    }
}

/// A name that a publisher may give.
pub(crate) fn check_header_name(name: &str) -> Result<()> {
    match is_header_name(name) && !name.starts_with(RESERVED) {
        true => Ok(()),
        false => Err(Error::InvalidHeaderName(name.to_owned())),
    }
}

/// `bytes` as PostgreSQL writes them, which has a space after each comma and colon.
pub(crate) fn check_headers_size(bytes: usize) -> Result<()> {
    match bytes {
        ..=MAX_HEADERS => Ok(()),
        bytes => Err(Error::HeadersTooLarge(bytes)),
    }
}

fn is_header_name(name: &str) -> bool {
    (1..=MAX_HEADER_NAME).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// What of a stored message breaks a rule, but for its type, which many messages share.
#[cfg(feature = "sqlx")]
pub(crate) fn broken_by(
    key: Option<&str>,
    headers: Option<(&Headers, &str)>,
    content_type: Option<&str>,
) -> Result<()> {
    key.map_or(Ok(()), check_key)?;
    content_type.map_or(Ok(()), check_content_type)?;
    let Some((headers, json)) = headers else {
        return Ok(());
    };
    if !json.starts_with('{') {
        return Err(Error::HeadersNoObject);
    }
    check_headers_size(json.len())?;
    headers
        .iter()
        .filter(|(name, _)| !ITS_OWN.contains(name))
        .try_for_each(|(name, _)| check_header_name(name))
}
