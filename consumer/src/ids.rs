//! Numbers that must not be taken for each other: a fence with two of them exchanged is none.

use serde::Deserialize;

/// A lane of a subscription, from 0 up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, sqlx::Type)]
#[serde(transparent)]
#[sqlx(transparent)]
pub(crate) struct Lane(i16);

impl Lane {
    /// The remainder of a number, of so many lanes.
    #[inline]
    pub(crate) fn of(number: i64, lanes: u16) -> Self {
        // There are 1,024 lanes at most.
        Self(number.rem_euclid(i64::from(lanes)) as i16)
    }

    /// Its place among the subscription's lanes.
    #[inline]
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Under which a lane is owned: each claim of it raises it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Deserialize, sqlx::Type)]
#[serde(transparent)]
#[sqlx(transparent)]
pub(crate) struct Epoch(pub(crate) i32);

impl Epoch {
    /// Under which no lane is owned.
    pub(crate) const OF_NOBODY: Self = Self(-1);

    /// That of the claim after this one.
    pub(crate) fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// A group's subscription to a topic.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Deserialize, sqlx::Type)]
#[serde(transparent)]
#[sqlx(transparent)]
pub(crate) struct SubscriptionId(pub(crate) i32);

/// A session of an instance.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, sqlx::Type)]
#[serde(transparent)]
#[sqlx(transparent)]
pub(crate) struct ConsumerId(pub(crate) i32);

macro_rules! shows_its_number {
    ($($id:ident)*) => {
        $(impl std::fmt::Display for $id {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::fmt::Debug for $id {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        })*
    };
}

shows_its_number!(Lane Epoch SubscriptionId ConsumerId);
