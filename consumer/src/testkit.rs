//! What the testkit knows of a consumer. Hidden and without a promise: only the testkit of the same version uses it.

use std::sync::Arc;
use std::time::Duration;

use postbox::MessageId;
use tokio::sync::{mpsc, oneshot};

use crate::consumer::ConsumerHandle;
use crate::extract::Invocation;
use crate::handler::HandlerDefinition;
use crate::outcome::{BoxFuture, Outcome};
pub use crate::protocol::standing::Standing;
use crate::session::Ask;

pub use postbox_core::link::is_direct;

/// How things stand with each of its executors, once each has nothing to do but wait; `None`: the session is lost, or an executor is. It waits for as long
/// as one has something to do at once.
pub async fn standings(handle: &ConsumerHandle) -> Option<Vec<Standing>> {
    let (asker, mut answers) = mpsc::unbounded_channel();
    handle.asks().send(Ask::Tell(asker)).ok()?;
    let mut standings = Vec::new();
    while let Some(standing) = answers.recv().await {
        standings.push(standing);
    }
    (standings.len() == handle.executors()).then_some(standings)
}

/// Has it follow the database's clock, which was moved by so much since the consumer started. When it returns, all that was told before is asked
/// after that.
pub async fn follow(handle: &ConsumerHandle, moved: Duration) {
    let (followed, is_followed) = oneshot::channel();
    if handle.asks().send(Ask::Follow { moved, followed }).is_ok() {
        // A session that is lost looks at the clock when it is there again.
        let _ = is_followed.await;
    }
}

/// Why it has ended by itself, if it has.
pub fn why_ended(handle: &ConsumerHandle) -> Option<String> {
    handle.why_ended()
}

/// The name of a handler with its path.
pub fn name(definition: &HandlerDefinition) -> &'static str {
    definition.name
}

/// Message and key of a run; of a batch, those of its first.
pub fn message(invocation: &Invocation) -> (MessageId, Option<&str>) {
    let message = invocation.record.message();
    (message.id, message.key.as_deref())
}

/// What a handler does.
pub type Run = Arc<dyn Fn(Invocation) -> BoxFuture<Outcome> + Send + Sync>;

/// Puts something between its handler and the layers around it.
pub fn wrap(definition: &mut HandlerDefinition, wrap: impl FnOnce(Run) -> Run) {
    definition.run = definition.run.take().map(wrap);
}
