#[test]
fn x() {
    let _ = stateright::Expectation::Always;
}
