//! The pages of the guide, and the README, so that their Rust blocks are compiled. Their SQL and shell blocks run in `cli/tests/guide.rs`.

macro_rules! pages {
    ($($page:ident $file:literal),* $(,)?) => {
        $(#[doc = include_str!(concat!("src/", $file))] pub mod $page {})*
    };
}

pages! {
    getting_started "getting-started.md",
    publishing "publishing.md",
    other_languages "other-languages.md",
    handlers "handlers.md",
    failure "failure.md",
    time "time.md",
    ordering "ordering.md",
    broadcast "broadcast.md",
    pacing "pacing-and-replay.md",
    operating "operating.md",
    errors "errors.md",
    testing "testing.md",
    deploying "deploying.md",
    postgresql "postgresql.md",
    upgrading "upgrading.md",
    coming_from "coming-from.md",
    guarantees "guarantees.md",
    faq "faq.md",
}

#[doc = include_str!("../../README.md")]
pub mod readme {}
