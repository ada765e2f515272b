//! What the macros accept, and what they answer to each mistake.
//!
//! After a deliberate change of a message: `TRYBUILD=overwrite cargo test -p postbox-tests --test macros_ui`.
//!
//! What is accepted is compiled with this suite. As cases of trybuild they would have all dependencies built once more, for minutes, where the
//! mistakes need them but checked.
#![allow(unreachable_pub, clippy::unwrap_used)]

#[path = "ui/pass/handler.rs"]
mod handler;
#[path = "ui/pass/handler_options.rs"]
mod handler_options;
#[path = "ui/pass/message_enum.rs"]
mod message_enum;
#[path = "ui/pass/message_struct.rs"]
mod message_struct;
/// Tests themselves.
#[path = "ui/pass/test.rs"]
mod test;

#[test]
fn the_macros_accept_what_the_documentation_shows() {
    handler::main();
    handler_options::main();
    message_enum::main();
    message_struct::main();
}

#[test]
fn a_mistake_is_answered_with_its_mend() {
    let cases = trybuild::TestCases::new();
    cases.compile_fail("tests/ui/fail/*.rs");
}
