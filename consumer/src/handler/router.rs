//! Which handler takes a message.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use postbox::log::{Filters, StoredMessage};

use crate::extract::Invocation;
use crate::handler::Hook;
use crate::handler::filter::{ByType, Filter};
use crate::handler::retry::Retry;
use crate::handler::{Expired, HandlerDefinition, Undecodable};
use crate::layer::Run;
use crate::outcome::panicked;
use crate::outcome::{BoxFuture, Outcome};

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
    /// In a transaction of its own.
    pub(crate) settles: bool,
    /// Most messages of one run.
    pub(crate) batch: usize,
    pub(crate) batch_wait: std::time::Duration,
    pub(crate) expired: Expired,
    pub(crate) undecodable: Undecodable,
    pub(crate) on_dead_letter: Option<Hook>,
    pub(crate) filter: Option<Filter>,
    run: Run,
}

impl Handler {
    /// `None` if the definition has no function to call.
    pub(crate) fn new(definition: &HandlerDefinition, filters: &Filters) -> Option<Self> {
        Some(Self {
            filter: Filter::of(definition, filters),
            name: definition.short_name(),
            timeout: definition.timeout,
            retry: definition.retry,
            transactional: definition.is_transactional(),
            settles: definition.settles(),
            batch: definition.batch.unwrap_or(1),
            batch_wait: definition.batch_wait,
            expired: definition.expired,
            undecodable: definition.undecodable,
            on_dead_letter: definition.on_dead_letter.clone(),
            run: definition.run.clone()?,
        })
    }

    /// Whether its filter does not want a message. One that has failed was compared when it was read first.
    pub(crate) fn refuses(&self, message: &StoredMessage) -> bool {
        let refuses = |number: i16| message.refused_by.iter().any(|refused| refused.abs() == number);
        (self.filter.as_ref()).is_some_and(|filter| refuses(filter.number))
    }

    /// Whether its filter cannot be evaluated of a message.
    pub(crate) fn cannot_tell(&self, message: &StoredMessage) -> bool {
        (self.filter.as_ref()).is_some_and(|filter| message.refused_by.contains(&-filter.number))
    }

    pub(crate) fn call(&self, invocation: Invocation) -> BoxFuture<Outcome> {
        // What panics before it gives a future is as what panics in it.
        match std::panic::catch_unwind(AssertUnwindSafe(|| (self.run)(invocation))) {
            Ok(run) => run,
            Err(panic) => Box::pin(async move { Err(panicked(panic)) }),
        }
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

    /// Of which types this finds a handler.
    pub(crate) fn takes(&self) -> Takes {
        let all = self.any.is_some().then_some(Takes::ALL);
        let untyped = self.find(None).map(|_| "");
        let types = self.by_type.keys().map(String::as_str);
        types.chain(all).chain(untyped).collect()
    }

    /// The filters of the types that it takes; none, if no handler has one.
    pub(crate) fn filters(&self) -> ByType {
        let text = |handler: &Arc<Handler>| handler.filter.as_ref().map(|filter| filter.text.clone());
        let takes = self.takes();
        let filters: ByType = (takes.types().into_iter())
            .filter_map(|name| {
                let handler = match name {
                    Takes::ALL => self.any.as_ref(),
                    "" => self.find(None),
                    name => self.find(Some(name)),
                };
                Some((name.to_owned(), text(handler?)))
            })
            .collect();
        match filters.values().any(Option::is_some) {
            true => filters,
            false => ByType::new(),
        }
    }

    pub(crate) fn handlers(&self) -> impl Iterator<Item = &Arc<Handler>> {
        self.by_type.values().chain(&self.any)
    }
}

/// Which message types an instance takes, as it registers them: `*` stands for all, an empty name for untyped messages. A type that the others call
/// `*` has a name that no publisher may give.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Takes(HashSet<String>);

impl Takes {
    const ALL: &str = "*";

    /// An untyped message has the type "".
    pub(crate) fn has(&self, message_type: &str) -> bool {
        self.0.contains(message_type) || self.0.contains(Self::ALL)
    }

    /// In order.
    pub(crate) fn types(&self) -> Vec<&str> {
        let mut types: Vec<&str> = self.0.iter().map(String::as_str).collect();
        types.sort_unstable();
        types
    }
}

impl<T: Into<String>> FromIterator<T> for Takes {
    fn from_iter<I: IntoIterator<Item = T>>(types: I) -> Self {
        Self(types.into_iter().map(Into::into).collect())
    }
}
