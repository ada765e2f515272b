use postbox_testkit::Kit;

static MIGRATOR: i32 = 1;

#[postbox_testkit::test(migration = "migrations")]
async fn misspelt(_kit: Kit) {}

#[postbox_testkit::test(migrator = sqlx::migrate!())]
async fn no_path(_kit: Kit) {}

#[postbox_testkit::test(migrator)]
async fn without_a_value(_kit: Kit) {}

#[postbox_testkit::test(migrations = MIGRATOR)]
async fn no_folder(_kit: Kit) {}

#[postbox_testkit::test(migrator = MIGRATOR, migrations = "migrations")]
async fn both(_kit: Kit) {}

fn main() {}
