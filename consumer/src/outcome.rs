//! What became of a run of a handler.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use postbox_core::restarts::panic_text;
use postbox_core::text;

/// What became of one run of a handler.
pub type Outcome = Result<(), HandlerError>;

/// A boxed future, as handlers return it.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Why a handler failed, and what is to be done with the message.
///
/// Any error becomes one with `?` and is retried by the handler's policy. It has no `std::error::Error` of its own, as
/// `anyhow::Error` has none, so that it can be made from every error. In a handler that returns `anyhow::Result` it goes through `?` as well, and keeps
/// what it says is to be done.
#[derive(Clone)]
pub struct HandlerError {
    pub(crate) decision: Decision,
    pub(crate) reason: String,
}

#[derive(Clone, Debug)]
pub(crate) enum Decision {
    /// By the handler's policy.
    Retry,
    /// After this span, whatever the policy's backoff says.
    RetryIn(Duration),
    /// Not again: it is settled and counted.
    Discard,
    /// Not again: to the dead letters, however many attempts are left.
    DeadLetter,
    /// After this span, as if it had not run.
    Postpone(Duration),
    /// By the handler's policy for payloads that it cannot understand.
    Undecodable,
    /// Of a batch: these messages failed, by offset, and the others did not.
    OfEach(BTreeMap<i64, HandlerError>),
    /// Of a batch that did not run: these messages failed, by offset, and the others have not run.
    Unfit(BTreeMap<i64, HandlerError>),
}

impl HandlerError {
    /// The one place where they are made, so that every reason is one that the database takes.
    pub(crate) fn new(decision: Decision, why: impl fmt::Display) -> Self {
        Self {
            decision,
            reason: text::clean(why),
        }
    }

    /// Retried by the handler's policy.
    pub fn retry(why: impl fmt::Display) -> Self {
        Self::new(Decision::Retry, why)
    }

    /// Retried after a span, whatever the policy's backoff says.
    pub fn retry_in(span: Duration, why: impl fmt::Display) -> Self {
        Self::new(Decision::RetryIn(span), why)
    }

    /// Not a failure: the message runs again after a span as if it had not run, so nothing is counted or logged and the attempt keeps its
    /// number. Its key waits for it. For a handler that cannot do its work now through no fault of the message.
    pub fn postpone(span: Duration, why: impl fmt::Display) -> Self {
        Self::new(Decision::Postpone(span), why)
    }

    /// Not retried: the message goes to the dead letters at once, for an operator to look at. Its key goes on or waits as the handler's
    /// [`Retry`](crate::Retry) says.
    pub fn dead_letter(why: impl fmt::Display) -> Self {
        Self::new(Decision::DeadLetter, why)
    }

    /// The payload cannot be understood, so trying again cannot help: what becomes of the message says the handler's
    /// [`undecodable`](crate::HandlerDefinition::undecodable). Messages and [`Json`](crate::Json) say so themselves; for an extractor of your own. Of a
    /// [`Batch`](crate::Batch) only the messages are concerned whose extractor says so.
    pub fn undecodable(why: impl fmt::Display) -> Self {
        Self::new(Decision::Undecodable, why)
    }

    /// Whether it says that the message is not to be tried again.
    pub fn is_final(&self) -> bool {
        matches!(self.decision, Decision::DeadLetter | Decision::Discard)
    }

    /// Whether it says that the run does not count.
    pub fn is_postponed(&self) -> bool {
        matches!(self.decision, Decision::Postpone(_))
    }

    /// Not retried: the message is settled, counted and logged.
    pub fn discard(why: impl fmt::Display) -> Self {
        Self::new(Decision::Discard, why)
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.decision, self.reason)
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<E> for HandlerError {
    fn from(error: E) -> Self {
        let error = error.into();
        let mut reason = text::clean(&error);
        let mut decision = Decision::Retry;
        let mut source = error.source();
        for _ in 0..CAUSES {
            let Some(cause) = source else { break };
            if let Some(Verdict(verdict)) = cause.downcast_ref() {
                decision = verdict.decision.clone();
            }
            let cause_text = text::clean(cause);
            // Many errors already say their source.
            if !reason.contains(&cause_text) {
                reason.push_str(": ");
                reason.push_str(&cause_text);
            }
            source = cause.source();
        }
        Self::new(decision, reason)
    }
}

/// A [`HandlerError`] on its way through errors of another kind, as their source.
#[derive(Debug)]
struct Verdict(HandlerError);

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Verdict {}

/// A [`HandlerError`] as a `std::error::Error`, for what takes only these, such as layers. Made into a `HandlerError` again, by `?` and by whatever way it
/// took, it says what the first one said is to be done.
// It has the verdict as its source, because what an `anyhow::Error` itself holds cannot be asked for once it is boxed.
#[derive(Debug)]
pub struct HandlerFailure(Verdict);

impl From<HandlerError> for HandlerFailure {
    fn from(error: HandlerError) -> Self {
        Self(Verdict(error))
    }
}

impl fmt::Display for HandlerFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for HandlerFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

#[cfg(feature = "anyhow")]
impl From<HandlerError> for anyhow::Error {
    fn from(error: HandlerError) -> Self {
        anyhow::Error::new(HandlerFailure::from(error))
    }
}

/// More causes than anybody reads; one may be its own.
const CAUSES: usize = 32;

/// What a handler may return: nothing, or a result with an error that [`HandlerError`] can be made from.
#[diagnostic::on_unimplemented(
    message = "a handler cannot return `{Self}`",
    label = "return `()` or `Result<(), HandlerError>`",
    note = "the error may be any type that converts into `HandlerError` with `?`, such as `anyhow::Error`; a handler of batches may also return `BatchResult`"
)]
pub trait IntoOutcome {
    /// Whether it says of each message of a batch what became of it.
    const OF_EACH: bool = false;

    /// As an outcome.
    fn into_outcome(self) -> Outcome;
}

impl IntoOutcome for () {
    fn into_outcome(self) -> Outcome {
        Ok(())
    }
}

impl<E: Into<HandlerError>> IntoOutcome for Result<(), E> {
    fn into_outcome(self) -> Outcome {
        self.map_err(Into::into)
    }
}

pub(crate) fn panicked(panic: Box<dyn std::any::Any + Send>) -> HandlerError {
    HandlerError::retry(format!("the handler panicked: {}", panic_text(panic.as_ref())))
}

pub(crate) fn timed_out(timeout: Duration) -> HandlerError {
    HandlerError::retry(format!(
        "the handler took longer than its timeout of {timeout:?} and was cancelled"
    ))
}

#[cfg(all(test, feature = "anyhow"))]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn what_an_error_says_is_to_be_done_survives_anyhow() {
        fn inner() -> Result<(), HandlerError> {
            Err(HandlerError::dead_letter("no such card"))
        }
        fn plain() -> anyhow::Result<()> {
            inner()?;
            Ok(())
        }
        fn outer() -> anyhow::Result<()> {
            plain().context("charging")?;
            Ok(())
        }
        for (result, says) in [(plain(), "no such card"), (outer(), "charging: no such card")] {
            let error = result.into_outcome().expect_err("it failed");
            assert!(matches!(error.decision, Decision::DeadLetter), "{error:?}");
            assert_eq!(error.reason, says);
        }
        let error = HandlerError::from(anyhow::anyhow!("other").context("x"));
        assert!(matches!(error.decision, Decision::Retry), "{error:?}");
    }
}
