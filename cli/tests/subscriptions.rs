//! `postbox subscriptions` and `postbox doctor`, as operators run them.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

use postbox_testkit::TestDatabase;
use serde_json::Value;

fn postbox(db: &TestDatabase, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_postbox"))
        .args(arguments)
        .env("DATABASE_URL", db.url())
        .env_remove("RUST_LOG")
        .output()
        .unwrap()
}

fn succeed(db: &TestDatabase, arguments: &[&str]) -> String {
    let output = postbox(db, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn refuse(db: &TestDatabase, arguments: &[&str], code: i32) -> String {
    let output = postbox(db, arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn preview(db: &TestDatabase, arguments: &[&str]) -> String {
    let output = postbox(db, arguments);
    assert_eq!(output.status.code(), Some(3), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn list(db: &TestDatabase) -> Value {
    serde_json::from_str(&succeed(db, &["subscriptions", "list", "--json"])).unwrap()
}

/// Ten messages, of which group `mail` has handled six.
async fn prepare() -> TestDatabase {
    let db = TestDatabase::new().await.unwrap();
    for n in 0..10 {
        succeed(&db, &["publish", "orders", "--payload", &n.to_string()]);
    }
    sqlx::raw_sql(
        "SELECT * FROM postbox.sequence(); \
         SELECT * FROM postbox.subscribe('mail', 'orders', 4::smallint, 'key', NULL, 'earliest', NULL); \
         UPDATE postbox.lane SET position = 6",
    )
    .execute(db.pool())
    .await
    .unwrap();
    db
}

#[tokio::test]
async fn a_seek_shows_what_it_would_do_and_does_it_with_yes() {
    let db = prepare().await;
    let said = preview(&db, &["subscriptions", "seek", "mail", "orders", "--to", "2"]);
    assert!(
        said.contains("from offset 6 to 2, so 4 messages would be delivered again; --yes does it"),
        "{said}"
    );
    assert_eq!(list(&db)[0]["position"], 6);
    let done = succeed(
        &db,
        &["subscriptions", "seek", "mail", "orders", "--to", "2", "--yes"],
    );
    assert_eq!(done, "mail on orders is at offset 2\n");
    assert_eq!(
        (&list(&db)[0]["position"], &list(&db)[0]["backlog"]),
        (&2.into(), &8.into())
    );
    for (to, position) in [("latest", 10), ("earliest", 0), ("2020-01-01", 0), ("1h", 0)] {
        succeed(
            &db,
            &["subscriptions", "seek", "mail", "orders", "--to", to, "--yes"],
        );
        assert_eq!(list(&db)[0]["position"], position, "{to}");
    }
    let error = refuse(
        &db,
        &["subscriptions", "seek", "mail", "orders", "--to", "soon"],
        2,
    );
    assert!(
        error.contains("earliest, latest, an offset, or an instant"),
        "{error}"
    );
    let error = refuse(
        &db,
        &["subscriptions", "seek", "mail", "parcels", "--to", "latest"],
        1,
    );
    assert!(
        error.contains("group mail has no subscription to topic parcels"),
        "{error}"
    );
}

#[tokio::test]
async fn settings_are_stored_shown_and_taken_back() {
    let db = prepare().await;
    succeed(&db, &["subscriptions", "pause", "mail"]);
    succeed(
        &db,
        &[
            "subscriptions",
            "limit",
            "mail",
            "orders",
            "--rate",
            "2.5",
            "--instance-rate",
            "1",
        ],
    );
    succeed(
        &db,
        &[
            "subscriptions",
            "window",
            "mail",
            "orders",
            "22:00-06:00 Europe/Berlin",
        ],
    );
    let human = succeed(&db, &["subscriptions", "list"]);
    assert!(
        human.contains("paused, 2.5/s, 1/s each, 22:00-06:00 Europe/Berlin"),
        "{human}"
    );
    let stored = &list(&db)[0];
    assert_eq!(
        (&stored["paused"], &stored["rate_limit"]),
        (&true.into(), &2.5.into())
    );
    succeed(&db, &["subscriptions", "resume", "mail", "orders"]);
    succeed(
        &db,
        &[
            "subscriptions",
            "limit",
            "mail",
            "--rate",
            "none",
            "--instance-rate",
            "none",
        ],
    );
    succeed(&db, &["subscriptions", "window", "mail", "orders", "none"]);
    let stored = &list(&db)[0];
    assert_eq!(stored["paused"], false);
    assert!(
        stored["rate_limit"].is_null() && stored["drain_window"].is_null(),
        "{stored}"
    );
    for wrong in [
        &["limit", "mail", "orders"][..],
        &["limit", "mail", "orders", "--rate", "0"],
        &["window", "mail", "orders", "22:00-06:00 Berlin"],
        &["window", "mail", "orders", "late"],
    ] {
        refuse(&db, &[&["subscriptions"], wrong].concat(), 2);
    }
    let error = refuse(&db, &["subscriptions", "limit", "male", "--rate", "7"], 1);
    assert!(error.contains("there is no subscription of male"), "{error}");
    let ahead = succeed(&db, &["subscriptions", "pause", "male"]);
    assert!(ahead.contains("there is no subscription of male yet"), "{ahead}");
}

#[tokio::test]
async fn a_replay_copies_what_is_settled_and_a_drop_forgets() {
    let db = prepare().await;
    let said = preview(
        &db,
        &[
            "subscriptions",
            "replay",
            "mail",
            "orders",
            "--from",
            "1",
            "--to",
            "4",
        ],
    );
    assert!(
        said.contains("offsets 1 to before 4 again, up to 3 messages; --yes does it"),
        "{said}"
    );
    let said = preview(&db, &["subscriptions", "drop", "mail", "orders"]);
    assert!(said.contains("with its 4 unsettled messages"), "{said}");
    assert_eq!(
        succeed(&db, &["subscriptions", "drop", "mail", "orders", "--yes"]),
        "dropped mail on orders\n"
    );
    assert_eq!(list(&db).as_array().map(Vec::len), Some(0));
}

#[tokio::test]
async fn the_doctor_names_what_is_wrong_and_fails_if_it_is_an_error() {
    let db = prepare().await;
    // Unsequenced, and nobody sequences.
    succeed(&db, &["publish", "orders", "--payload", "11"]);
    let output = postbox(&db, &["doctor", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let named: Vec<&str> = findings
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|finding| finding["name"].as_str())
        .collect();
    assert!(
        named.contains(&"no-dispatcher") && named.contains(&"no-consumer"),
        "{findings}"
    );
    let human = postbox(&db, &["doctor"]);
    let human = String::from_utf8(human.stdout).unwrap();
    assert!(
        human.contains("error: no dispatcher is connected, and 1 messages wait for one"),
        "{human}"
    );
    assert!(
        human.contains("postbox subscriptions drop mail orders"),
        "{human}"
    );

    let empty = TestDatabase::empty().await.unwrap();
    let output = postbox(&empty, &["doctor"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("has no Postbox schema: run `postbox migrate`")
    );
}
