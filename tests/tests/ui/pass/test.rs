//! Everything that a test may look like, with the crate under another path, too.

mod reexports {
    pub use postbox_testkit;
}

use postbox_testkit::Kit;

/// It returns nothing.
#[postbox_testkit::test]
pub(crate) async fn plain(kit: Kit) {
    kit.settled().await;
}

#[postbox_testkit::test()]
#[should_panic(expected = "as it should")]
async fn with_attributes(mut _kit: Kit) {
    panic!("as it should");
}

#[postbox_testkit::test]
async fn with_a_result(Kit { .. }: Kit) -> Result<(), Box<dyn std::error::Error>> {
    Err("no").or(Ok(()))
}

#[postbox_testkit::test(crate = reexports::postbox_testkit)]
async fn by_way_of_another_crate(_: Kit) -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}

#[postbox_testkit::test(crate = "reexports::postbox_testkit", migrations = "tests/kit/migrations")]
async fn with_migrations(kit: Kit) {
    sqlx::query("SELECT FROM reservation")
        .execute(kit.pool())
        .await
        .unwrap();
}
