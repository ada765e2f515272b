//! What the application shares with its handlers.

use super::{Extract, Invocation, Needs};
use crate::outcome::HandlerError;

/// A clone of the value given to [`Consumer::state`](crate::Consumer::state).
///
/// The consumer refuses to start when a handler asks for a state that it was not given.
#[derive(Debug, Clone, Copy, Default)]
pub struct State<S>(pub S);

impl<S: Clone + Send + Sync + 'static> Extract for State<S> {
    const NEEDS: Needs = Needs::state::<S>();

    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        // Checked at start.
        invocation
            .states
            .get()
            .map(Self)
            .ok_or_else(|| HandlerError::retry(format!("no state {}", std::any::type_name::<S>())))
    }
}
