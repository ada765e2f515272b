//! Checking a model exhaustively.

use std::fmt::Debug;
use std::hash::Hash;

use stateright::{Checker, HasDiscoveries, Model};

/// Every property holds in every state, and what must be possible is.
pub(crate) fn assert_sound<M>(model: M)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync + 'static,
    M::Action: Clone + Debug + PartialEq,
{
    let checker = model.checker().threads(2).spawn_bfs().join();
    println!("{} states", checker.unique_state_count());
    checker.assert_properties();
}

/// Those of these properties that a variant breaks.
pub(crate) fn broken<M>(model: M, variant: impl Debug, properties: &[&'static str]) -> Vec<&'static str>
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync + 'static,
    M::Action: Clone + Debug + PartialEq,
{
    let checker = model
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!("{variant:?}: {} states", checker.unique_state_count());
    properties
        .iter()
        .copied()
        .filter(|property| checker.discovery(property).is_some())
        .collect()
}
