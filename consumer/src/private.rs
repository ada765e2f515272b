//! What the attributes expand to. Hidden and without a promise: only the macros of the same version use it.

use crate::extract::Needs;
use crate::outcome::{Decision, HandlerError, Outcome};

/// An outcome of which an error that is permanent, by the handler's own word, is a dead letter at once.
pub fn classified<E: Into<HandlerError>>(
    result: Result<(), E>,
    is_permanent: impl FnOnce(&E) -> bool,
) -> Outcome {
    result.map_err(|error| {
        let is_permanent = is_permanent(&error);
        let mut error = error.into();
        if is_permanent && matches!(error.decision, Decision::Retry) {
            error.decision = Decision::DeadLetter;
        }
        error
    })
}

/// Fails at compile time where arguments, options and the return value of a handler do not go together. Of `batch` and `batch_wait` it says whether the
/// options are there.
#[track_caller]
pub const fn fits(arguments: &[Needs], batch: bool, batch_wait: bool, result_of_each: bool) {
    let mut all = Needs::NOTHING;
    let (mut n, mut batches) = (0, 0);
    while n < arguments.len() {
        // Refuses two topics.
        all = all.and(arguments[n]);
        if arguments[n].batch {
            batches += 1;
        }
        n += 1;
    }
    assert!(batches < 2, "a handler takes one batch");
    assert!(
        batches == 0 || batch,
        "a handler of batches says how many messages it takes at once: add batch = 100"
    );
    assert!(
        batches == 1 || !batch,
        "`batch` is for a handler that takes many messages at once: take them as `Batch<…>`"
    );
    assert!(
        batch || !batch_wait,
        "`batch_wait` is how long a batch waits for more messages, and goes with `batch`"
    );
    assert!(
        !result_of_each || batches == 1,
        "`BatchResult` says which messages of a batch failed: take a `Batch<…>`, or return `Result<(), HandlerError>`"
    );
    assert!(
        !(all.transaction && all.settlement),
        "a `Tx` settles the message by itself: take it, or a `Settlement` for a transaction of your own, but not both"
    );
    assert!(
        !(result_of_each && all.settlement),
        "a `Settlement` is of the whole batch, so no single messages of it can fail: return `Result<(), HandlerError>`"
    );
    assert!(
        !(result_of_each && all.transaction),
        "a `Tx` commits whole, so no single messages of its batch can fail: return `Result<(), HandlerError>`"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_calls_an_error_permanent_makes_it_a_dead_letter() {
        let fails = |permanent: bool| classified(Err::<(), _>(std::fmt::Error), |_| permanent);
        assert!(fails(true).expect_err("it failed").is_final());
        assert!(!fails(false).expect_err("it failed").is_final());
        // What the error says itself counts before.
        let later = HandlerError::retry_in(std::time::Duration::from_secs(1), "later");
        assert!(
            !classified(Err::<(), _>(later), |_| true)
                .expect_err("it failed")
                .is_final()
        );
    }
}
