//! What Postbox's own connections rely on, set when they connect: whatever the server, the database and the role default to.
//!
//! By `SET`, not as startup parameters, which poolers refuse. A transactional handler's connection is the application's and keeps its settings;
//! what its settlement relies on is said where that transaction begins (`checkout.rs` in `postbox-consumer`).

use sqlx::PgConnection;

/// The first statement undoes a limit that might cut off the others, the second makes names in all that follows mean what they mean here.
///
/// A lock that is not had in three seconds fails the statement, which is logged with who has it, and tried again. The server notices within a
/// minute that nobody is there any more, and gives back what the connection held.
const SETTINGS: &str = "SET statement_timeout = 0; \
     SET search_path = pg_catalog, pg_temp; \
     SET lock_timeout = '3s'; SET idle_session_timeout = 0; SET idle_in_transaction_session_timeout = '1min'; \
     SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; \
     SET default_transaction_deferrable = off; \
     SET client_encoding = 'UTF8'; SET standard_conforming_strings = on; SET array_nulls = on; SET transform_null_equals = off; \
     SET quote_all_identifiers = off; SET bytea_output = 'hex'; SET DateStyle = 'ISO, MDY'; SET IntervalStyle = 'postgres'; \
     SET TimeZone = 'UTC'; SET extra_float_digits = 1; SET client_min_messages = notice; SET row_security = on; \
     SET jit = off; SET plan_cache_mode = auto; SET max_parallel_workers_per_gather = 0; \
     SET enable_seqscan = on; SET enable_indexscan = on; SET enable_indexonlyscan = on; SET enable_bitmapscan = on; \
     SET enable_tidscan = on; SET enable_sort = on; SET enable_incremental_sort = on; SET enable_hashagg = on; \
     SET enable_material = on; SET enable_memoize = on; SET enable_nestloop = on; SET enable_mergejoin = on; SET enable_hashjoin = on; \
     SET enable_partition_pruning = on; \
     SET \"plpgsql.extra_errors\" = 'none'; SET \"plpgsql.extra_warnings\" = 'none'; \
     SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3; SET tcp_user_timeout = 60000; \
     SELECT set_config('transaction_timeout', '0', false) WHERE current_setting('transaction_timeout', true) IS NOT NULL; \
     DO $$ BEGIN SET client_connection_check_interval = '10s'; EXCEPTION WHEN OTHERS THEN NULL; END $$";

/// Sets them, and `also` what this connection is for.
pub(crate) async fn set(connection: &mut PgConnection, also: &'static str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(SETTINGS).execute(&mut *connection).await?;
    if !also.is_empty() {
        sqlx::raw_sql(also).execute(connection).await?;
    }
    Ok(())
}
