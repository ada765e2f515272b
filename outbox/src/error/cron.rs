//! What can be wrong with a schedule.

/// What is wrong with a schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CronError {
    /// The expression cannot be understood.
    #[error("cron expression {expression:?}, column {column}: {reason}")]
    Expression {
        /// The expression.
        expression: String,
        /// Where it is wrong, in characters from 1.
        column: usize,
        /// What is wrong there.
        reason: String,
    },
    /// The expression has no due time, such as the 30th of February.
    #[error("cron expression {0:?} is never due: there is no such date")]
    Never(String),
    /// There is no such time zone.
    #[error("time zone {0:?} is not known: give an IANA name such as Europe/Berlin or UTC")]
    TimeZone(String),
    /// The name is empty, too long, or has a character that is not allowed.
    #[error("cron name {0:?} is not allowed: it is 1 to 255 characters of A-Z a-z 0-9 . _ - : /")]
    Name(String),
    /// The message says something that a recurring message cannot have.
    #[error("a recurring message has no {0}: leave it out")]
    Option(&'static str),
    /// There is no such policy.
    #[error("{0:?} is no policy for missed firings; known are: skip, once, all")]
    Missed(String),
}
