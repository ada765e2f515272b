//! The `postbox` command.
fn main() {}
