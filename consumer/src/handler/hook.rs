//! Who is told of dead letters, in the process that gave the message up.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use postbox::__private::Transaction;
use sqlx::PgPool;
use tokio::sync::Semaphore;
use tracing::warn;

use crate::extract::{Extract, Invocation, Needs, OwnSlot, TxSource};
use crate::outcome::{BoxFuture, HandlerError, IntoOutcome, Outcome, panicked, timed_out};

/// A function that can be told of dead letters: an async function, or a closure that gives a future, of up to six arguments that a handler of one message
/// could take and of [`DeadLetter`](crate::DeadLetter).
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be told of dead letters",
    label = "not such a function",
    note = "it is an `async fn` of up to six arguments, such as `DeadLetter`, the message, `Tx` and `State<S>`, that returns nothing or a `Result` as a handler does"
)]
pub trait DeadLetterHook<Arguments>: Send + Sync + 'static {
    /// What its arguments need.
    const NEEDS: Needs;

    /// Calls it.
    fn call(self: Arc<Self>, invocation: Invocation) -> BoxFuture<Outcome>;
}

macro_rules! hooks {
    ($($argument:ident)*) => {
        impl<F, R, $($argument,)*> DeadLetterHook<($($argument,)*)> for F
        where
            F: Fn($($argument),*) -> R + Send + Sync + 'static,
            R: Future<Output: IntoOutcome> + Send + 'static,
            $($argument: Extract + Send + 'static,)*
        {
            const NEEDS: Needs = Needs::NOTHING$(.and($argument::NEEDS))*;

            #[allow(non_snake_case, unused_mut, unused_variables)]
            fn call(self: Arc<Self>, mut invocation: Invocation) -> BoxFuture<Outcome> {
                Box::pin(async move {
                    $(let $argument = $argument::extract(&mut invocation).await?;)*
                    (*self)($($argument),*).await.into_outcome()
                })
            }
        }
    };
}

hooks!();
hooks!(A);
hooks!(A B);
hooks!(A B C);
hooks!(A B C D);
hooks!(A B C D E);
hooks!(A B C D E G);

/// A hook of a handler's definition.
#[derive(Clone)]
pub(crate) struct Hook {
    pub(crate) needs: Needs,
    call: Arc<dyn Fn(Invocation) -> BoxFuture<Outcome> + Send + Sync>,
}

impl Hook {
    pub(crate) fn new<A, H: DeadLetterHook<A>>(hook: H) -> Self {
        let hook = Arc::new(hook);
        Self {
            needs: H::NEEDS,
            call: Arc::new(move |invocation| hook.clone().call(invocation)),
        }
    }
}

/// Where hooks of a subscription run, and how many at once.
pub(crate) struct Hooks {
    pub(crate) pool: PgPool,
    pub(crate) turns: Semaphore,
    telling: AtomicUsize,
}

impl Hooks {
    pub(crate) fn new(pool: PgPool, at_once: usize) -> Self {
        Self {
            pool,
            turns: Semaphore::new(at_once),
            telling: AtomicUsize::new(0),
        }
    }

    /// Somebody is about to be told.
    pub(crate) fn begin(hooks: &Arc<Self>) -> Turn {
        hooks.telling.fetch_add(1, Ordering::Relaxed);
        Turn(hooks.clone())
    }

    /// How many are being told, or wait for their turn.
    pub(crate) fn telling(&self) -> usize {
        self.telling.load(Ordering::Relaxed)
    }
}

/// Of one who is told.
pub(crate) struct Turn(Arc<Hooks>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.telling.fetch_sub(1, Ordering::Relaxed);
    }
}

/// At most so many hooks of a subscription run at once; those with a transaction one after another, so that they take one connection of the pool.
pub(crate) const HOOKS_AT_ONCE: usize = 16;

/// A hook with what it is told.
pub(crate) struct Telling {
    pub(crate) hook: Hook,
    pub(crate) invocation: Invocation,
    pub(crate) timeout: Duration,
}

impl Telling {
    /// Tells it. What goes wrong is logged.
    pub(crate) async fn tell(self, turn: Turn) {
        let hooks = &turn.0;
        let Some(letter) = &self.invocation.letter else {
            return;
        };
        let (group, id) = (letter.group.clone(), letter.id);
        let Ok(_turn) = hooks.turns.acquire().await else {
            return;
        };
        let timeout = self.timeout;
        let run = AssertUnwindSafe(self.run(&hooks.pool)).catch_unwind();
        let error = match tokio::time::timeout(timeout, run).await {
            Ok(Ok(Ok(()))) => return,
            Ok(Ok(Err(error))) => error,
            Ok(Err(panic)) => panicked(panic),
            Err(_) => timed_out(timeout),
        };
        warn!(%group, %id, %error, "the hook for dead letters failed");
    }

    async fn run(self, pool: &PgPool) -> Outcome {
        let Self {
            hook, mut invocation, ..
        } = self;
        if !hook.needs.transaction {
            return (hook.call)(invocation).await;
        }
        let slot: OwnSlot = OwnSlot::default();
        let begun = Transaction::begin(pool, "BEGIN").await?;
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(begun);
        invocation.tx = Some(TxSource::Own(slot.clone()));
        (hook.call)(invocation).await?;
        let transaction = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        match transaction {
            Some(transaction) => Ok(transaction.commit().await?),
            None => Err(HandlerError::retry(
                "it still has its Tx: it must let it go before it returns",
            )),
        }
    }
}
