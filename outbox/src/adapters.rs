//! What has a transaction open, one client a file. Each maps texts and bytes to what its client binds, and its errors to ours.

#[cfg(feature = "deadpool-postgres")]
mod deadpool_postgres;
#[cfg(feature = "diesel")]
pub mod diesel;
#[cfg(feature = "diesel-async")]
mod diesel_async;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sea-orm")]
mod sea_orm;
#[cfg(feature = "sqlx")]
pub(crate) mod sqlx;
#[cfg(feature = "sqlx-0_8")]
mod sqlx_0_8;
#[cfg(feature = "tokio-postgres")]
mod tokio_postgres;
