//! Which handler takes a message.

use std::collections::HashMap;
use std::sync::Arc;

use crate::extract::Invocation;
use crate::handler::{BoxFuture, DeadLetterHook, Expired, HandlerDefinition, Outcome};
use crate::retry::Retry;

/// The handlers of one subscription by message type.
pub(crate) struct Router {
    by_type: HashMap<String, Arc<Handler>>,
    any: Option<Arc<Handler>>,
}

/// A handler as it is run.
pub(crate) struct Handler {
    pub(crate) name: &'static str,
    pub(crate) timeout: std::time::Duration,
    pub(crate) retry: Retry,
    pub(crate) transactional: bool,
    /// Most messages of one run.
    pub(crate) batch: usize,
    pub(crate) batch_wait: std::time::Duration,
    pub(crate) expired: Expired,
    pub(crate) on_dead_letter: Option<DeadLetterHook>,
    run: Arc<dyn Fn(Invocation) -> BoxFuture<Outcome> + Send + Sync>,
}

impl Handler {
    /// `None` if the definition has no function to call.
    pub(crate) fn new(definition: &HandlerDefinition) -> Option<Self> {
        Some(Self {
            name: definition.short_name(),
            timeout: definition.timeout,
            retry: definition.retry,
            transactional: definition.transactional,
            batch: definition.batch.unwrap_or(1),
            batch_wait: definition.batch_wait,
            expired: definition.expired,
            on_dead_letter: definition.on_dead_letter.clone(),
            run: definition.run.clone()?,
        })
    }

    pub(crate) fn call(&self, invocation: Invocation) -> BoxFuture<Outcome> {
        (self.run)(invocation)
    }
}

impl Router {
    pub(crate) fn new() -> Self {
        Self {
            by_type: HashMap::new(),
            any: None,
        }
    }

    /// Adds a handler for its types; the name of the one that already takes one of them is the error.
    pub(crate) fn add(
        &mut self,
        types: &[String],
        handler: Arc<Handler>,
    ) -> Result<(), (&'static str, Option<String>)> {
        if types.is_empty() {
            return match self.any.replace(handler) {
                Some(other) => Err((other.name, None)),
                None => Ok(()),
            };
        }
        for name in types {
            if let Some(other) = self.by_type.insert(name.clone(), handler.clone()) {
                return Err((other.name, Some(name.clone())));
            }
        }
        Ok(())
    }

    pub(crate) fn find(&self, message_type: Option<&str>) -> Option<&Arc<Handler>> {
        match message_type {
            Some(name) => self.by_type.get(name).or(self.any.as_ref()),
            // Untyped: whoever takes everything, else the only handler there is.
            None => self.any.as_ref().or_else(|| {
                let mut handlers = self.by_type.values();
                let first = handlers.next()?;
                handlers.all(|other| Arc::ptr_eq(first, other)).then_some(first)
            }),
        }
    }

    pub(crate) fn handlers(&self) -> impl Iterator<Item = &Arc<Handler>> {
        self.by_type.values().chain(&self.any)
    }
}
