//! What the macros accept, and what they answer to each mistake.
//!
//! After a deliberate change of a message: `TRYBUILD=overwrite cargo test -p postbox-testkit --test macros_ui`.

#[test]
fn the_macros_accept_what_the_documentation_shows() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/ui/pass/*.rs");
}

#[test]
fn a_mistake_is_answered_with_its_mend() {
    let cases = trybuild::TestCases::new();
    cases.compile_fail("tests/ui/fail/*.rs");
}
