use postbox_testkit::Kit;

#[postbox_testkit::test]
fn not_async(_kit: Kit) {}

#[postbox_testkit::test]
async fn without_a_kit() {}

#[postbox_testkit::test]
async fn with_more_than_a_kit(_kit: Kit, _pool: sqlx::PgPool) {}

#[postbox_testkit::test]
async fn generic<T: Default>(_kit: Kit) {
    T::default();
}

#[postbox_testkit::test]
#[test]
async fn a_test_twice(_kit: Kit) {}

#[postbox_testkit::test]
struct NotAFunction;

fn main() {}
