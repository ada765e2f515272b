use postbox_consumer::{ScheduledAt, Tx, cron};

#[cron("0 6 * *")]
async fn four_fields(_at: ScheduledAt) {}

#[cron("@fortnightly")]
async fn unknown_macro(_at: ScheduledAt) {}

#[cron(tz = "Europe/Berlin")]
async fn without_schedule(_at: ScheduledAt) {}

#[cron("@daily", tz = "Berlin time")]
async fn zone_alphabet(_at: ScheduledAt) {}

#[cron("@daily", timezone = "Europe/Berlin")]
async fn unknown_option(_at: ScheduledAt) {}

#[cron("@daily", missed = "never")]
async fn missed(_at: ScheduledAt) {}

#[cron("@daily", name = "daily report")]
async fn name_alphabet(_at: ScheduledAt) {}

#[cron("@daily")]
fn not_async(_at: ScheduledAt) {}

#[cron("@daily")]
async fn borrowed(_tx: &Tx) {}

#[cron("@daily")]
async fn no_extractor(_at: std::time::SystemTime) {}

#[cron("@daily")]
async fn no_outcome(_at: ScheduledAt) -> u32 {
    1
}

fn main() {}
