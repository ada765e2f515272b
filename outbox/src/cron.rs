//! Recurring messages: cron schedules, and the register of them that dispatchers fire from.
//!
//! A schedule is a cron expression in a time zone. Each of its due times becomes one ordinary message, whatever the number of dispatchers; the
//! message says in its header [`SCHEDULED_AT`] for which due time it is, and in [`CRON`] of which schedule.
//!
//! ```no_run
//! use postbox::cron::{Cron, Missed, Schedule};
//! use postbox::{Outgoing, Publish};
//!
//! # async fn example(pool: sqlx::PgPool) -> Result<(), postbox::Error> {
//! let weekdays_at_six = Schedule::parse("0 6 * * mon-fri", "Europe/Berlin")?;
//! let report = Cron::new("daily-report", weekdays_at_six, Outgoing::json("reports", "daily")).missed(Missed::Once);
//! let mut tx = pool.begin().await?;
//! tx.register(report).await?;
//! tx.commit().await?;
//! # Ok(()) }
//! ```
//!
//! # Expressions
//! Five fields: minute (0–59), hour (0–23), day of the month (1–31), month (1–12 or jan–dec), day of the week (0–7 or sun–sat, where 0 and 7 are
//! Sunday); or six, with the second (0–59) first. A field is `*`, a value, a range `a-b`, a step `*/n` or `a-b/n`, or a list of these with
//! commas. The day of the month also takes `L` (the last) and `15W` (the nearest weekday), the day of the week `mon#2` (the second) and `friL` (the last).
//! If both days are restricted, either is enough, as in Vixie cron. Macros: `@hourly`, `@daily` or `@midnight`, `@weekly`, `@monthly`,
//! `@yearly` or `@annually`.
//!
//! # When clocks change
//! A schedule whose second, minute and hour are all values, lists or ranges names times of the day; one with a `*` or a step
//! in any of them is a rhythm.
//!
//! | | times of the day, such as `30 2,14 * * *` | rhythms, such as `*/15 * * * *` |
//! |---|---|---|
//! | clocks go forward: the time does not exist | fires once, at the first instant after the gap | goes on after the gap |
//! | clocks go back: the time comes twice | fires at the first of the two | fires at both |
//!
//! So a daily job runs once every day, and a job every quarter of an hour runs every quarter of an hour. Two times that fall in one gap are one due time.
//!
//! # When the database's clock is wrong
//! A due time that has fired does not fire again, however the clock is set. Once a clock that was ahead is set back, the due times go on from there; those that
//! fired meanwhile are left out, and those that the wrong clock passed over (by the policy for missed ones) fire when they come.

mod expression;
pub(crate) mod register;
#[cfg(feature = "sqlx")]
mod registered;
mod schedule;
mod wall;

pub use crate::error::CronError;
pub use crate::reserved::{CRON, SCHEDULED_AT};
pub use register::Cron;
#[cfg(feature = "sqlx")]
pub use registered::{Registered, find, list, pause, remove, resume};
pub use schedule::{Fired, MAX_MISSED, Missed, Schedule};

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta, Utc};

    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("an instant in RFC 3339")
    }

    fn schedule(expression: &str, zone: &str) -> Schedule {
        Schedule::parse(expression, zone).expect("a schedule")
    }

    /// The due times of a span, in the local time of the zone, with the offset.
    fn due(expression: &str, zone: &str, from: &str, to: &str) -> Vec<String> {
        let schedule = schedule(expression, zone);
        let (from, to) = (at(from), at(to));
        schedule
            .upcoming(from)
            .take_while(|at| *at <= to)
            .map(|at| schedule.local(at)[5..].replace(":00 ", " "))
            .collect()
    }

    #[test]
    fn what_is_wrong_is_shown_where_it_is() {
        for (expression, column, says) in [
            ("", 1, "it is empty"),
            ("   ", 1, "it is empty"),
            ("61 * * * *", 1, "\"61\" is no minute (0 to 59"),
            ("  0  24 * * *", 6, "\"24\" is no hour (0 to 23"),
            ("0 0 0 * *", 5, "\"0\" is no day of the month (1 to 31"),
            ("0 0 * 13 *", 7, "\"13\" is no month (1 to 12"),
            ("0 0 * * 8", 9, "\"8\" is no day of the week (0 to 7"),
            ("0 0 * * mon-fry", 9, "\"mon-fry\" is no day of the week"),
            ("1,2,99,4 * * * *", 5, "\"99\" is no minute"),
            ("1,,2 * * * *", 1, "a comma stands between two values"),
            ("*/0 * * * *", 1, "\"*/0\" is no minute"),
            ("99 * * * * *", 1, "\"99\" is no second"),
            ("0 6 * *", 8, "it has 4 fields: minute, hour"),
            ("0 0 6 * * * 2027", 13, "it has 7 fields"),
            ("@noon", 1, "\"@noon\" is no macro; known are: @hourly, @daily"),
            ("ü * * * *", 1, "\"ü\" is no minute"),
        ] {
            match Schedule::parse(expression, "UTC") {
                Err(CronError::Expression {
                    column: found,
                    reason,
                    ..
                }) => {
                    assert_eq!(found, column, "column of {expression:?}: {reason}");
                    assert!(
                        reason.starts_with(says) || reason.contains(says),
                        "{expression:?}: {reason}"
                    );
                }
                other => panic!("{expression:?} gave {other:?}"),
            }
        }
        assert_eq!(
            Schedule::parse("0 0 30 2 *", "UTC").unwrap_err(),
            CronError::Never("0 0 30 2 *".to_owned())
        );
        let zone = Schedule::parse("@daily", "Europe/Berlyn").unwrap_err();
        assert!(zone.to_string().contains("Europe/Berlyn"), "{zone}");
    }

    #[test]
    fn macros_names_and_seconds_are_understood() {
        for (expression, next) in [
            ("@hourly", "2026-01-01T01:00:00Z"),
            ("@daily", "2026-01-02T00:00:00Z"),
            ("@midnight", "2026-01-02T00:00:00Z"),
            ("@WEEKLY", "2026-01-04T00:00:00Z"),
            ("@monthly", "2026-02-01T00:00:00Z"),
            ("@yearly", "2027-01-01T00:00:00Z"),
            ("*/10 * * * * *", "2026-01-01T00:00:10Z"),
            ("0 6 * * mon-fri", "2026-01-01T06:00:00Z"),
            ("0 6 * FEB SUN", "2026-02-01T06:00:00Z"),
            ("0 6 * * 7", "2026-01-04T06:00:00Z"),
            ("0 0 L * *", "2026-01-31T00:00:00Z"),
            ("0 0 * * fri#2", "2026-01-09T00:00:00Z"),
            ("0 0 13 * fri", "2026-01-02T00:00:00Z"),
        ] {
            let next_at = schedule(expression, "UTC").after(at("2026-01-01T00:00:00Z"));
            assert_eq!(next_at, Some(at(next)), "{expression}");
        }
    }

    #[test]
    fn where_clocks_go_forward_a_time_of_the_day_fires_once_after_the_gap_and_a_rhythm_goes_on() {
        // 02:00 → 03:00.
        let day = ("2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
        assert_eq!(
            due("30 2 * * *", "Europe/Berlin", day.0, day.1),
            ["03-29 03:00 +0200", "03-30 02:30 +0200"]
        );
        assert_eq!(
            due(
                "*/30 * * * *",
                "Europe/Berlin",
                "2026-03-29T00:00:00Z",
                "2026-03-29T02:00:00Z"
            ),
            [
                "03-29 01:30 +0100",
                "03-29 03:00 +0200",
                "03-29 03:30 +0200",
                "03-29 04:00 +0200"
            ]
        );
        // 02:00 → 03:00.
        let day = ("2026-03-07T12:00:00Z", "2026-03-09T12:00:00Z");
        assert_eq!(
            due("15 2 * * *", "America/New_York", day.0, day.1),
            ["03-08 03:00 -0400", "03-09 02:15 -0400"]
        );
        assert_eq!(
            due(
                "*/30 * * * *",
                "America/New_York",
                "2026-03-08T06:00:00Z",
                "2026-03-08T08:00:00Z"
            ),
            [
                "03-08 01:30 -0500",
                "03-08 03:00 -0400",
                "03-08 03:30 -0400",
                "03-08 04:00 -0400"
            ]
        );
        // 02:00 → 02:30.
        let day = ("2026-10-03T00:00:00Z", "2026-10-04T20:00:00Z");
        assert_eq!(
            due("15 2 * * *", "Australia/Lord_Howe", day.0, day.1),
            ["10-04 02:30 +1100", "10-05 02:15 +1100"]
        );
        assert_eq!(
            due(
                "*/15 * * * *",
                "Australia/Lord_Howe",
                "2026-10-03T15:00:00Z",
                "2026-10-03T16:00:00Z"
            ),
            [
                "10-04 01:45 +1030",
                "10-04 02:30 +1100",
                "10-04 02:45 +1100",
                "10-04 03:00 +1100"
            ]
        );
    }

    #[test]
    fn where_clocks_go_back_a_time_of_the_day_fires_once_and_a_rhythm_goes_on() {
        // 03:00 → 02:00.
        let day = ("2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z");
        assert_eq!(
            due("30 2 * * *", "Europe/Berlin", day.0, day.1),
            ["10-25 02:30 +0200", "10-26 02:30 +0100"]
        );
        assert_eq!(
            due(
                "*/30 * * * *",
                "Europe/Berlin",
                "2026-10-24T23:30:00Z",
                "2026-10-25T02:00:00Z"
            ),
            [
                "10-25 02:00 +0200",
                "10-25 02:30 +0200",
                "10-25 02:00 +0100",
                "10-25 02:30 +0100",
                "10-25 03:00 +0100"
            ]
        );
        // 02:00 → 01:00.
        let day = ("2026-10-31T12:00:00Z", "2026-11-02T12:00:00Z");
        assert_eq!(
            due("15 1 * * *", "America/New_York", day.0, day.1),
            ["11-01 01:15 -0400", "11-02 01:15 -0500"]
        );
        assert_eq!(
            due(
                "*/30 * * * *",
                "America/New_York",
                "2026-11-01T04:30:00Z",
                "2026-11-01T07:00:00Z"
            ),
            [
                "11-01 01:00 -0400",
                "11-01 01:30 -0400",
                "11-01 01:00 -0500",
                "11-01 01:30 -0500",
                "11-01 02:00 -0500"
            ]
        );
        // 02:00 → 01:30.
        let day = ("2026-04-04T00:00:00Z", "2026-04-05T20:00:00Z");
        assert_eq!(
            due("45 1 * * *", "Australia/Lord_Howe", day.0, day.1),
            ["04-05 01:45 +1100", "04-06 01:45 +1030"]
        );
        assert_eq!(
            due(
                "*/15 * * * *",
                "Australia/Lord_Howe",
                "2026-04-04T14:15:00Z",
                "2026-04-04T15:30:00Z"
            ),
            [
                "04-05 01:30 +1100",
                "04-05 01:45 +1100",
                "04-05 01:30 +1030",
                "04-05 01:45 +1030",
                "04-05 02:00 +1030"
            ]
        );
    }

    #[test]
    fn due_times_only_ever_go_forward_through_a_year_of_every_zone() {
        for (n, zone) in chrono_tz::TZ_VARIANTS.iter().enumerate() {
            // Rhythms of every twentieth zone only, to be done soon.
            let expressions = ["30 2 * * *", "0 0 * * *", "7 */3 * * *", "*/20 * * * *"];
            for expression in &expressions[..if n % 20 == 0 { 4 } else { 2 }] {
                let schedule = schedule(expression, zone.name());
                let mut last = at("2026-01-01T00:00:00Z");
                let end = at("2027-01-01T00:00:00Z");
                let mut days = 0;
                for due in schedule.upcoming(last).take_while(|due| *due <= end) {
                    assert!(due > last, "{expression} in {zone}: {due} after {last}");
                    (last, days) = (due, days + 1);
                }
                if *expression == "30 2 * * *" {
                    assert!((365..=366).contains(&days), "{zone}: {days} in a year");
                }
            }
        }
    }

    #[test]
    fn missed_due_times_fire_by_the_policy() {
        let none = Fired::default();
        let every_minute = schedule("* * * * *", "UTC");
        let (first, now) = (at("2026-05-01T11:00:00Z"), at("2026-05-01T12:00:10Z"));
        let firings = |missed| every_minute.firings(first, now, missed, &none);
        assert_eq!(firings(Missed::Skip), [at("2026-05-01T12:00:00Z")]);
        assert_eq!(firings(Missed::Once), [at("2026-05-01T12:00:00Z")]);
        let all = firings(Missed::All);
        assert_eq!(
            (all.len(), all[0], all[60]),
            (61, first, at("2026-05-01T12:00:00Z"))
        );

        let daily = schedule("@daily", "UTC");
        let first = at("2026-04-28T00:00:00Z");
        assert!(daily.firings(first, now, Missed::Skip, &none).is_empty());
        assert_eq!(
            daily.firings(first, now, Missed::Once, &none),
            [at("2026-05-01T00:00:00Z")]
        );
        assert_eq!(daily.firings(first, now, Missed::All, &none).len(), 4);

        // A little late is not missed.
        let seconds = schedule("* * * * * *", "UTC");
        let first = now - TimeDelta::seconds(3);
        for missed in [Missed::Skip, Missed::Once, Missed::All] {
            assert_eq!(seconds.firings(first, now, missed, &none).len(), 4, "{missed:?}");
        }
        // Bounded, and quick after a year.
        let all = seconds.firings(at("2025-05-01T11:00:00Z"), now, Missed::All, &none);
        assert_eq!((all.len(), all[999]), (MAX_MISSED, now));
        assert!(
            seconds
                .firings(now + TimeDelta::seconds(1), now, Missed::All, &none)
                .is_empty()
        );
    }

    #[test]
    fn a_time_in_a_gap_fires_also_when_it_is_looked_for_late() {
        let schedule = schedule("30 2 * * *", "Europe/Berlin");
        let first = schedule.after(at("2026-03-28T12:00:00Z")).expect("a due time");
        assert_eq!(first, at("2026-03-29T01:00:00Z"));
        for seconds in [0, 30, 90, 90_000] {
            let firings = schedule.firings(
                first,
                first + TimeDelta::seconds(seconds),
                Missed::All,
                &Fired::default(),
            );
            assert_eq!(firings[0], first, "{seconds} s late");
        }
    }
}
