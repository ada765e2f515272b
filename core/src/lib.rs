//! What dispatcher and consumers share: the connection that is opened again, what a step tells consumers and how
//! they know that it did, texts from outside, and daily windows.
//!
//! Not for use by itself: without a promise between versions. What users need of it, `postbox-consumer` shows.

pub mod announcements;
pub mod clock;
pub mod link;
pub mod locks;
pub mod restarts;
pub mod seal;
mod settings;
pub mod text;
pub mod url;
mod window;

pub use window::{DailyWindow, WindowError};
