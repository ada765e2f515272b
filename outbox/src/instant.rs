//! Instants as PostgreSQL has them, read as the nearest that this program can hold.
//!
//! PostgreSQL knows `infinity`, and years that chrono does not, and sqlx panics at them. A row must be readable whatever it holds, so both
//! ends are cut: what is beyond is as good as never.

use chrono::{DateTime, Utc};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgTypeInfo, PgValueFormat, PgValueRef};
use sqlx::{Decode, Postgres, Type, ValueRef};

/// 1 January 2000, from which PostgreSQL counts, in microseconds of the Unix epoch.
const EPOCH: i64 = 946_684_800_000_000;
/// PostgreSQL's first day, 24 November 4714 BC, in microseconds of its own epoch.
const FIRST: i64 = -211_813_488_000_000_000;

/// A `timestamptz` of any value, `infinity` included.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamptz(pub DateTime<Utc>);

/// The same, or null.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaybeTimestamptz(pub Option<DateTime<Utc>>);

impl Timestamptz {
    fn from_micros(micros: i64) -> Self {
        let since_1970 = micros.max(FIRST).checked_add(EPOCH);
        Self(
            since_1970
                .and_then(DateTime::from_timestamp_micros)
                .unwrap_or(DateTime::<Utc>::MAX_UTC),
        )
    }
}

impl Type<Postgres> for Timestamptz {
    fn type_info() -> PgTypeInfo {
        <DateTime<Utc> as Type<Postgres>>::type_info()
    }
}

impl<'r> Decode<'r, Postgres> for Timestamptz {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        match value.format() {
            PgValueFormat::Binary => Ok(Self::from_micros(Decode::<Postgres>::decode(value)?)),
            PgValueFormat::Text => match value.as_str()? {
                "infinity" => Ok(Self::from_micros(i64::MAX)),
                "-infinity" => Ok(Self::from_micros(i64::MIN)),
                _ => Ok(Self(Decode::<Postgres>::decode(value)?)),
            },
        }
    }
}

impl Type<Postgres> for MaybeTimestamptz {
    fn type_info() -> PgTypeInfo {
        Timestamptz::type_info()
    }
}

impl<'r> Decode<'r, Postgres> for MaybeTimestamptz {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        match value.is_null() {
            true => Ok(Self(None)),
            false => Ok(Self(Some(Timestamptz::decode(value)?.0))),
        }
    }
}

impl From<Timestamptz> for DateTime<Utc> {
    fn from(stored: Timestamptz) -> Self {
        stored.0
    }
}

impl From<MaybeTimestamptz> for Option<DateTime<Utc>> {
    fn from(stored: MaybeTimestamptz) -> Self {
        stored.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_an_instant_and_the_order_is_kept() {
        let numbers = [
            i64::MIN,
            i64::MIN + 1,
            FIRST,
            -1,
            0,
            1,
            i64::MAX / 2,
            i64::MAX - EPOCH,
            i64::MAX - 1,
            i64::MAX,
        ];
        let instants = numbers.map(|number| Timestamptz::from_micros(number).0);
        assert!(instants.is_sorted());
        assert_eq!(instants[0].to_rfc3339(), "-4713-11-24T00:00:00+00:00");
        assert_eq!(instants[4].to_rfc3339(), "2000-01-01T00:00:00+00:00");
        assert_eq!(instants[9], DateTime::<Utc>::MAX_UTC);
    }
}
