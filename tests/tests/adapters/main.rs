//! Publishing through every client: each has the whole suite, since what holds for one is to hold for all.

mod deadpool_postgres;
mod diesel;
mod diesel_async;
mod messages;
mod postgres;
mod script;
mod sea_orm;
mod sqlx;
mod sqlx_0_8;
mod suite;
mod tokio_postgres;
