//! JSON as it is stored, unread.

use serde_json::Value;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgTypeInfo, PgValueFormat, PgValueRef};
use sqlx::{Decode, Postgres, Type, ValueRef};

/// The text of a `jsonb`.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Json<'r>(pub &'r str);

impl Type<Postgres> for Json<'_> {
    fn type_info() -> PgTypeInfo {
        <sqlx::types::JsonValue as Type<Postgres>>::type_info()
    }
}

impl<'r> Decode<'r, Postgres> for Json<'r> {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        let bytes = match (value.format(), value.as_bytes()?) {
            // The version of its form.
            (PgValueFormat::Binary, [1, json @ ..]) => json,
            (PgValueFormat::Binary, _) => return Err("a jsonb of an unknown version".into()),
            (PgValueFormat::Text, json) => json,
        };
        Ok(Self(std::str::from_utf8(bytes)?))
    }
}

/// JSON or null; what no Rust type holds (a number such as 1e400, nesting beyond measure) as its text.
#[doc(hidden)]
#[derive(Clone, Debug)]
pub struct MaybeJson(pub Option<Value>);

impl Type<Postgres> for MaybeJson {
    fn type_info() -> PgTypeInfo {
        Json::type_info()
    }
}

impl<'r> Decode<'r, Postgres> for MaybeJson {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        if value.is_null() {
            return Ok(Self(None));
        }
        let Json(text) = Json::decode(value)?;
        Ok(Self(Some(
            serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned())),
        )))
    }
}

impl From<MaybeJson> for Option<Value> {
    fn from(stored: MaybeJson) -> Self {
        stored.0
    }
}
