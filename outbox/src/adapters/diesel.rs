//! diesel, which has no type for an open transaction: so that one is open is asked when something is published.
//!
//! ```no_run
//! # use diesel::prelude::*;
//! # use diesel::pg::Pg;
//! # fn example<C: diesel::connection::LoadConnection<Backend = Pg>>(connection: &mut C) -> Result<(), postbox::Error> {
//! use postbox::{Outgoing, diesel::Publish};
//!
//! connection.transaction::<_, postbox::Error, _>(|connection| {
//!     diesel::sql_query("UPDATE carts SET abandoned = true WHERE id = 42").execute(connection)?;
//!     connection.publish(Outgoing::json("carts", &serde_json::json!({"cart": 42})).key("42"))?;
//!     Ok(())
//! })
//! # }
//! ```
//!
//! What goes for any connection is here; diesel-async's is a [`postbox::Publish`](crate::Publish) by itself.

use std::fmt;

use diesel::connection::{Connection, LoadConnection, TransactionManager, TransactionManagerStatus};
use diesel::pg::Pg;
use diesel::query_builder::{AstPass, QueryFragment, QueryId};
use diesel::result::DatabaseErrorKind as Kind;
use diesel::result::Error::QueryBuilderError as Refused;
use diesel::sql_types::{Array, Binary, Nullable, Text};
use diesel::{QueryResult, RunQueryDsl};

use chrono::{DateTime, Utc};

use crate::blocking;
#[cfg(feature = "cron")]
use crate::cron::Cron;
use crate::error::{DatabaseError, Error, Result};
use crate::id::MessageId;
use crate::outgoing::Outgoing;
use crate::publish::blocking::OpenTransaction;
use crate::publish::{Answer, Bind, Query};

/// A connection on which a transaction is open, as diesel knows: by `transaction`, a transaction builder or `begin_test_transaction`. (A `BEGIN` that was
/// sent as SQL is none, since diesel does not know of it.)
///
/// It is what [`blocking::Publish`] is implemented for; [`Publish`] makes one for each call.
pub struct InTransaction<'a, C>(&'a mut C);

/// Not derived: diesel's connections have none.
impl<C> fmt::Debug for InTransaction<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InTransaction").finish_non_exhaustive()
    }
}

impl<'a, C: Connection<Backend = Pg>> InTransaction<'a, C> {
    /// Costs no round trip.
    ///
    /// # Errors
    ///
    /// [`Error::NoTransaction`]; a connection whose transaction is broken.
    pub fn of(connection: &'a mut C) -> Result<Self> {
        is_open(C::TransactionManager::transaction_manager_status_mut(connection))?;
        Ok(Self(connection))
    }
}

impl<C: LoadConnection<Backend = Pg>> OpenTransaction for InTransaction<'_, C> {
    fn run(&mut self, query: Query) -> Result<Answer> {
        Ok(Answer(Bound(query).load(self.0)?))
    }
}

/// [`blocking::Publish`] for connections of diesel: all of it is refused where no transaction is open.
pub trait Publish: LoadConnection<Backend = Pg> + Sized {
    /// As [`Publish::publish`](crate::Publish::publish).
    ///
    /// # Errors
    ///
    /// [`Error::NoTransaction`], a message that is refused, which leaves the transaction usable; else [`Error::Database`].
    fn publish(&mut self, message: impl Into<Outgoing>) -> Result<MessageId> {
        blocking::Publish::publish(&mut InTransaction::of(self)?, message)
    }

    /// As [`Publish::publish_all`](crate::Publish::publish_all).
    ///
    /// # Errors
    ///
    /// [`Error::NoTransaction`], [`Error::InBatch`], which leaves the transaction usable; else [`Error::Database`].
    fn publish_all<I>(&mut self, messages: I) -> Result<Vec<MessageId>>
    where
        I: IntoIterator,
        I::Item: Into<Outgoing>,
    {
        blocking::Publish::publish_all(&mut InTransaction::of(self)?, messages)
    }

    /// As [`Publish::cancel`](crate::Publish::cancel).
    ///
    /// # Errors
    ///
    /// [`Error::NoTransaction`]; else [`Error::Database`].
    fn cancel(&mut self, id: MessageId) -> Result<bool> {
        blocking::Publish::cancel(&mut InTransaction::of(self)?, id)
    }

    /// As [`Publish::reschedule`](crate::Publish::reschedule).
    ///
    /// # Errors
    ///
    /// [`Error::NoTransaction`]; else [`Error::Database`].
    fn reschedule(&mut self, id: MessageId, instant: DateTime<Utc>) -> Result<bool> {
        blocking::Publish::reschedule(&mut InTransaction::of(self)?, id, instant)
    }

    /// As [`Publish::register`](crate::Publish::register).
    ///
    /// # Errors
    ///
    /// [`Error::NoTransaction`], what [`Cron`] refuses, which leaves the transaction usable; else [`Error::Database`].
    #[cfg(feature = "cron")]
    fn register(&mut self, cron: Cron) -> Result<Option<DateTime<Utc>>> {
        blocking::Publish::register(&mut InTransaction::of(self)?, cron)
    }
}

impl<C: LoadConnection<Backend = Pg>> Publish for C {}

pub(super) fn is_open(status: &TransactionManagerStatus) -> Result<()> {
    match status.transaction_depth()? {
        Some(_) => Ok(()),
        None => Err(Error::NoTransaction),
    }
}

/// A statement as a query of diesel's, which keeps it prepared as it does those that it builds. (`sql_query` has a statement prepared each time.)
pub(super) struct Bound(pub(super) Query);

impl QueryFragment<Pg> for Bound {
    /// diesel numbers what is bound itself, in the order of the text.
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let mut pieces = self.0.sql.split('$');
        out.push_sql(pieces.next().unwrap_or_default());
        for piece in pieces {
            let end = piece.find(|c: char| !c.is_ascii_digit()).unwrap_or(piece.len());
            let (number, rest) = piece.split_at(end);
            let number = number.parse().ok().and_then(|n: usize| n.checked_sub(1));
            match number.and_then(|n| self.0.parameters.get(n)) {
                None => return Err(Refused("a parameter without a value".into())),
                Some(Bind::Text(text)) => out.push_bind_param::<Nullable<Text>, _>(text)?,
                Some(Bind::Bytes(bytes)) => out.push_bind_param::<Binary, _>(bytes)?,
                Some(Bind::Texts(texts)) => out.push_bind_param::<Array<Nullable<Text>>, _>(texts)?,
                Some(Bind::Blobs(blobs)) => out.push_bind_param::<Array<Binary>, _>(blobs)?,
            }
            out.push_sql(rest);
        }
        Ok(())
    }
}

/// By its text, since there are several.
impl QueryId for Bound {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

/// The one column that all statements with rows have.
impl diesel::query_builder::Query for Bound {
    type SqlType = Nullable<Text>;
}

impl<C> RunQueryDsl<C> for Bound {}

impl From<diesel::result::Error> for DatabaseError {
    fn from(error: diesel::result::Error) -> Self {
        let answered = matches!(&error, diesel::result::Error::DatabaseError(kind, _)
            if !matches!(kind, Kind::ClosedConnection | Kind::UnableToSendCommand));
        let told = Self::new(code(&error), error.to_string(), error);
        match answered {
            true => told.answered(),
            false => told,
        }
    }
}

/// diesel keeps the server's code to itself, and tells some kinds. Postbox's own errors have theirs as the constraint's name too.
fn code(error: &diesel::result::Error) -> Option<String> {
    let diesel::result::Error::DatabaseError(kind, told) = error else {
        return None;
    };
    if let Some(own) = told
        .constraint_name()
        .filter(|name| name.len() == 5 && name.starts_with("PB"))
    {
        return Some(own.to_owned());
    }
    let code = match kind {
        Kind::UniqueViolation => Some("23505"),
        Kind::ForeignKeyViolation => Some("23503"),
        Kind::NotNullViolation => Some("23502"),
        Kind::CheckViolation => Some("23514"),
        Kind::RestrictViolation => Some("23001"),
        Kind::ExclusionViolation => Some("23P01"),
        Kind::SerializationFailure => Some("40001"),
        Kind::ReadOnlyTransaction => Some("25006"),
        _ => None,
    };
    code.map(str::to_owned)
}

impl From<diesel::result::Error> for Error {
    fn from(error: diesel::result::Error) -> Self {
        Error::Database(error.into())
    }
}
