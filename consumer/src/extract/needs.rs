//! What an argument of a handler needs, known before anything runs.

use crate::state::StateType;

/// Most states of one argument.
const MOST: usize = 8;

/// What an argument of a handler needs; see [`Extract::NEEDS`](super::Extract::NEEDS).
///
/// An extractor that is made from others needs what they need:
///
/// ```
/// use postbox_consumer::{Delivery, Extract, HandlerError, Invocation, Needs, State};
///
/// #[derive(Clone)]
/// struct Tenants(/* … */);
///
/// /// The tenant in the header of that name.
/// struct Tenant(String);
///
/// impl Extract for Tenant {
///     const NEEDS: Needs = State::<Tenants>::NEEDS.and(Delivery::NEEDS);
///
///     async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
///         let State(_tenants) = State::<Tenants>::extract(invocation).await?;
///         let delivery = Delivery::extract(invocation).await?;
///         let tenant = delivery.headers.get("tenant").ok_or_else(|| HandlerError::undecodable("no tenant"))?;
///         Ok(Self(tenant.to_owned()))
///     }
/// }
/// ```
#[derive(Clone, Copy)]
pub struct Needs {
    pub(crate) topic: Option<&'static str>,
    pub(crate) types: &'static [&'static str],
    pub(crate) states: [Option<fn() -> StateType>; MOST],
    pub(crate) transaction: bool,
    pub(crate) settlement: bool,
    pub(crate) batch: bool,
    pub(crate) dead_letter: bool,
}

impl Needs {
    /// Nothing but the message, whatever it is.
    pub const NOTHING: Needs = Needs {
        topic: None,
        types: &[],
        states: [None; MOST],
        transaction: false,
        settlement: false,
        batch: false,
        dead_letter: false,
    };

    pub(crate) const TRANSACTION: Needs = Needs {
        transaction: true,
        ..Needs::NOTHING
    };

    pub(crate) const SETTLEMENT: Needs = Needs {
        settlement: true,
        ..Needs::NOTHING
    };

    pub(crate) const DEAD_LETTER: Needs = Needs {
        dead_letter: true,
        ..Needs::NOTHING
    };

    /// A message of this topic and one of these types.
    pub const fn message(topic: &'static str, types: &'static [&'static str]) -> Self {
        Self {
            topic: Some(topic),
            types,
            ..Self::NOTHING
        }
    }

    pub(crate) const fn state<S: 'static>() -> Self {
        let mut needs = Self::NOTHING;
        needs.states[0] = Some(StateType::of::<S>);
        needs
    }

    pub(crate) const fn of_each(self) -> Self {
        Self { batch: true, ..self }
    }

    /// Both.
    ///
    /// # Panics
    /// At compile time, if they are of different topics or have more than eight states together.
    #[track_caller]
    pub const fn and(self, other: Needs) -> Self {
        let mut both = self;
        if let Some(topic) = other.topic {
            if let Some(first) = self.topic {
                assert!(
                    is_same(first.as_bytes(), topic.as_bytes()),
                    "a handler takes messages of one topic: write a handler for each, in one group if they belong together"
                );
            }
            both.topic = Some(topic);
            both.types = other.types;
        }
        let (mut from, mut to) = (0, 0);
        while from < MOST && other.states[from].is_some() {
            while both.states[to].is_some() {
                to += 1;
                assert!(to < MOST, "an argument of a handler has at most eight states");
            }
            both.states[to] = other.states[from];
            from += 1;
        }
        both.transaction |= other.transaction;
        both.settlement |= other.settlement;
        both.batch |= other.batch;
        both.dead_letter |= other.dead_letter;
        both
    }
}

impl std::fmt::Debug for Needs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let states: Vec<_> = self.states.iter().flatten().map(|state| state().name).collect();
        f.debug_struct("Needs")
            .field("topic", &self.topic)
            .field("types", &self.types)
            .field("states", &states)
            .field("transaction", &self.transaction)
            .field("settlement", &self.settlement)
            .field("batch", &self.batch)
            .field("dead_letter", &self.dead_letter)
            .finish()
    }
}

const fn is_same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut n = 0;
    while n < a.len() {
        if a[n] != b[n] {
            return false;
        }
        n += 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_needs_are_kept() {
        let needs = Needs::state::<u8>()
            .and(Needs::message("orders", &["placed"]))
            .and(Needs::state::<u16>())
            .and(Needs::TRANSACTION)
            .and(Needs::NOTHING);
        let states: Vec<&str> = needs.states.iter().flatten().map(|state| state().name).collect();
        assert_eq!(states, ["u8", "u16"]);
        assert_eq!(
            (needs.topic, needs.types),
            (Some("orders"), ["placed"].as_slice())
        );
        assert!(needs.transaction && !needs.batch && !needs.dead_letter);
    }

    #[test]
    #[should_panic(expected = "messages of one topic")]
    fn messages_of_two_topics_are_refused() {
        let _ = Needs::message("a", &[]).and(Needs::message("ab", &[]));
    }
}
