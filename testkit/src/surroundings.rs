//! Databases whose settings nobody expects, as an administrator may have made them.

use sqlx::PgConnection;

use crate::Error;
use crate::statement::execute;

/// What `POSTBOX_TEST_SETTINGS` says for all databases of a run.
pub(crate) fn are_perverse() -> bool {
    std::env::var("POSTBOX_TEST_SETTINGS").is_ok_and(|settings| settings == "perverse")
}

/// Settings of a database that nobody expects, as SQL writes them: what [`TestDatabase::pervert`](crate::TestDatabase::pervert) sets.
pub const PERVERSE: &[(&str, &str)] = &[
    ("default_transaction_isolation", "'repeatable read'"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_deferrable", "on"),
    ("search_path", "public, pg_catalog"),
    ("\"DateStyle\"", "'SQL, DMY'"),
    ("\"IntervalStyle\"", "sql_standard"),
    ("\"TimeZone\"", "'Asia/Kathmandu'"),
    ("bytea_output", "escape"),
    ("extra_float_digits", "'-15'"),
    ("standard_conforming_strings", "off"),
    ("array_nulls", "off"),
    ("transform_null_equals", "on"),
    ("quote_all_identifiers", "on"),
    ("client_encoding", "'LATIN1'"),
    ("client_min_messages", "debug1"),
    ("application_name", "'somebody else'"),
    ("statement_timeout", "'1s'"),
    ("lock_timeout", "'10ms'"),
    ("idle_in_transaction_session_timeout", "'300ms'"),
    ("idle_session_timeout", "'2s'"),
    ("row_security", "off"),
    ("synchronous_commit", "off"),
    ("jit", "on"),
    ("jit_above_cost", "0"),
    ("plan_cache_mode", "force_custom_plan"),
    ("enable_indexscan", "off"),
    ("enable_indexonlyscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_nestloop", "off"),
    ("enable_partition_pruning", "off"),
    ("work_mem", "'64kB'"),
    ("check_function_bodies", "on"),
    ("\"plpgsql.extra_errors\"", "'all'"),
];

/// What an application that writes has set itself, and a test that sleeps.
pub(crate) const FOR_TESTS: &str = "SET default_transaction_read_only = off; SET default_transaction_isolation = 'read committed'; \
     SET default_transaction_deferrable = off; SET standard_conforming_strings = on; \
     SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET idle_session_timeout = 0; \
     SET enable_indexscan = on; SET enable_nestloop = on; SET jit = off";

/// New connections to the database begin with them.
pub(crate) async fn pervert(connection: &mut PgConnection, database: &str) -> Result<(), Error> {
    let statements: Vec<String> = PERVERSE
        .iter()
        .map(|(name, value)| format!("ALTER DATABASE {database} SET {name} = {value}"))
        .collect();
    execute(connection, statements.join("; ")).await
}
