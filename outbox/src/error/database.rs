//! What a client of PostgreSQL reports, whichever it is.

use std::error::Error as StdError;
use std::fmt;

/// An error of PostgreSQL, of the connection, or of the client (driver) that was used.
///
/// It says what the server said. The client's own error is its [`source`](StdError::source) and can be had by [`downcast_ref`](Self::downcast_ref):
///
/// ```
/// # fn example(error: postbox::DatabaseError) {
/// if let Some(sqlx::Error::PoolTimedOut) = error.downcast_ref::<sqlx::Error>() { /* … */ }
/// # }
/// ```
pub struct DatabaseError(Box<Reported>);

struct Reported {
    code: Option<String>,
    /// The server has answered, whether its code is known or not.
    answered: bool,
    text: String,
    source: Box<dyn StdError + Send + Sync>,
}

impl DatabaseError {
    /// From a client's error: the server's code and what to say, which some clients keep to themselves.
    pub(crate) fn new(
        code: Option<String>,
        text: String,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self(Box::new(Reported {
            answered: code.is_some(),
            code,
            text,
            source: source.into(),
        }))
    }

    /// The server has answered otherwise than it does to such a statement.
    pub(crate) fn answer(what: &str) -> Self {
        let text = format!("the server answered with {what}");
        Self::new(None, text.clone(), text)
    }

    /// It is the server's answer, of which the client does not tell the code.
    #[cfg(feature = "diesel")]
    pub(crate) fn answered(mut self) -> Self {
        self.0.answered = true;
        self
    }

    /// The server has refused the statement, and goes on: it has neither gone down (57P) nor been lost.
    #[doc(hidden)]
    pub fn is_refusal(&self) -> bool {
        self.0.answered && !self.code().is_some_and(|code| code.starts_with("57P"))
    }

    /// The server's five-character code (SQLSTATE), if the server has answered: see
    /// [PostgreSQL's table](https://www.postgresql.org/docs/current/errcodes-appendix.html).
    pub fn code(&self) -> Option<&str> {
        self.0.code.as_deref()
    }

    /// The client's error, if it is of this type.
    pub fn downcast_ref<E: StdError + 'static>(&self) -> Option<&E> {
        self.0.source.downcast_ref()
    }

    /// The client's error.
    pub fn into_source(self) -> Box<dyn StdError + Send + Sync> {
        self.0.source
    }
}

impl fmt::Display for DatabaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.text)
    }
}

impl fmt::Debug for DatabaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseError")
            .field("code", &self.0.code)
            .field("source", &self.0.source)
            .finish()
    }
}

impl StdError for DatabaseError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(self.0.source.as_ref())
    }
}
