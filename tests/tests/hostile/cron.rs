//! Cron where clocks change: each time of the day fires once and every beat of a rhythm fires, in all zones; and where the server's clock is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, Datelike, NaiveDateTime, Offset, TimeDelta, TimeZone, Timelike, Utc};
use chrono_tz::Tz;
use postbox::cron::{self, Cron, Missed, Schedule};
use postbox::{Outgoing, Publish};
use postbox_dispatcher::{Dispatcher, DispatcherHandle};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::PgPool;

const SOON: Duration = Duration::from_secs(30);

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("an instant in RFC 3339")
}

// --------------------------------------------------------------------------------------------------------- clocks that change

/// What an expression says, as sets, for one who knows no cron.
struct Spoken {
    expression: &'static str,
    is_rhythm: bool,
    minutes: &'static [u32],
    hours: &'static [u32],
    days: &'static [u32],
    weekdays: &'static [u32],
}

/// As in cron: either day is enough where both are restricted; empty is all.
impl Spoken {
    fn names(&self, wall: NaiveDateTime) -> bool {
        let of = |set: &[u32], value| set.is_empty() || set.contains(&value);
        let day = match (self.days, self.weekdays) {
            ([_, ..], [_, ..]) => {
                self.days.contains(&wall.day())
                    || self.weekdays.contains(&wall.weekday().num_days_from_sunday())
            }
            _ => of(self.days, wall.day()) && of(self.weekdays, wall.weekday().num_days_from_sunday()),
        };
        day && of(self.minutes, wall.minute()) && of(self.hours, wall.hour())
    }
}

const HALVES: &[u32] = &[0, 30];
const QUARTERS: &[u32] = &[0, 15, 30, 45];

#[rustfmt::skip]
const SPOKEN: &[Spoken] = &[
    Spoken { expression: "30 2 * * *", is_rhythm: false, minutes: &[30], hours: &[2], days: &[], weekdays: &[] },
    Spoken { expression: "30 2,14 * * *", is_rhythm: false, minutes: &[30], hours: &[2, 14], days: &[], weekdays: &[] },
    Spoken { expression: "0,30 0-3 * * *", is_rhythm: false, minutes: HALVES, hours: &[0, 1, 2, 3], days: &[], weekdays: &[] },
    Spoken { expression: "0-10,59 1-2,23 * * *", is_rhythm: false, minutes: &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 59], hours: &[1, 2, 23], days: &[], weekdays: &[] },
    Spoken { expression: "0 0 * * *", is_rhythm: false, minutes: &[0], hours: &[0], days: &[], weekdays: &[] },
    Spoken { expression: "15 0,1,2 1-15 * sun", is_rhythm: false, minutes: &[15], hours: &[0, 1, 2], days: &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], weekdays: &[0] },
    Spoken { expression: "*/15 * * * *", is_rhythm: true, minutes: QUARTERS, hours: &[], days: &[], weekdays: &[] },
    Spoken { expression: "0 * * * *", is_rhythm: true, minutes: &[0], hours: &[], days: &[], weekdays: &[] },
    Spoken { expression: "0-59/30 1,2 * * *", is_rhythm: true, minutes: HALVES, hours: &[1, 2], days: &[], weekdays: &[] },
    Spoken { expression: "45 */2 * * sat,sun", is_rhythm: true, minutes: &[45], hours: &[0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22], days: &[], weekdays: &[0, 6] },
];

/// The due times in a span, minute by minute, by the words of the documentation alone.
fn by_the_word(spoken: &Spoken, zone: Tz, from: DateTime<Utc>, to: DateTime<Utc>) -> Vec<DateTime<Utc>> {
    let minutes = |from: DateTime<Utc>, to| {
        std::iter::successors(Some(from), |at| Some(*at + TimeDelta::minutes(1)))
            .take_while(move |at| *at <= to)
    };
    let wall = |at: DateTime<Utc>| at.with_timezone(&zone).naive_local();
    if spoken.is_rhythm {
        return minutes(from, to).filter(|at| spoken.names(wall(*at))).collect();
    }
    // Each time that the clocks have not reached before is due now: the one they show, and those that they leave out.
    let mut due = BTreeSet::new();
    let start = from - TimeDelta::hours(26);
    let mut reached = wall(start);
    for at in minutes(start, to) {
        while reached < wall(at) {
            reached += TimeDelta::minutes(1);
            if spoken.names(reached) {
                due.insert(at);
            }
        }
    }
    due.range(from..).copied().collect()
}

/// Where the offset of a zone changes within ten years of 2026, to the second.
fn changes(zone: Tz) -> Vec<DateTime<Utc>> {
    let offset = |at: DateTime<Utc>| zone.offset_from_utc_datetime(&at.naive_utc()).fix();
    let (mut at_now, end) = (at("2016-01-01T00:00:00Z"), at("2037-01-01T00:00:00Z"));
    let mut found = Vec::new();
    while at_now < end {
        let next = at_now + TimeDelta::hours(12);
        if offset(at_now) != offset(next) {
            let (mut before, mut after) = (at_now, next);
            while after - before > TimeDelta::seconds(1) {
                let middle = before + TimeDelta::seconds((after - before).num_seconds() / 2);
                if offset(middle) == offset(before) {
                    before = middle;
                } else {
                    after = middle;
                }
            }
            found.push(after);
        }
        at_now = next;
    }
    found
}

#[test]
fn at_every_change_of_clocks_in_every_zone_schedules_do_what_is_documented() {
    // Zones that agree for days around a change do so for the same reason; each such case once.
    let mut seen = BTreeSet::new();
    let (mut changed, mut compared) = (0, 0);
    for zone in chrono_tz::TZ_VARIANTS {
        let offset = |at: DateTime<Utc>| {
            zone.offset_from_utc_datetime(&at.naive_utc())
                .fix()
                .local_minus_utc()
        };
        let mut moments = changes(zone);
        changed += moments.len();
        // A year's end in those whose clocks never change, too.
        moments.push(at("2027-01-01T00:00:00Z"));
        for change in moments {
            let (from, to) = (change - TimeDelta::hours(30), change + TimeDelta::hours(30));
            let offsets: Vec<i32> = (-60..=30)
                .map(|hours| offset(change + TimeDelta::hours(hours)))
                .collect();
            if !seen.insert((change, offset(change - TimeDelta::seconds(1)), offsets)) {
                continue;
            }
            for spoken in SPOKEN {
                let schedule = Schedule::parse(spoken.expression, zone.name()).unwrap();
                let expected = by_the_word(spoken, zone, from, to);
                let found: Vec<_> = schedule
                    .upcoming(from - TimeDelta::seconds(1))
                    .take_while(|due| *due <= to)
                    .collect();
                assert_eq!(
                    found, expected,
                    "{:?} in {zone} around {change}",
                    spoken.expression
                );
                compared += 1;
                // The same from any instant, not only from one due time to the next.
                for minutes in (0..3600).step_by(97) {
                    let start =
                        from + TimeDelta::minutes(minutes) + TimeDelta::milliseconds(1500 * (minutes % 3));
                    let next = expected.iter().find(|due| **due > start);
                    if let Some(next) = next {
                        assert_eq!(
                            schedule.after(start),
                            Some(*next),
                            "{:?} in {zone} after {start}",
                            spoken.expression
                        );
                    }
                }
            }
        }
    }
    assert!(
        changed > 5_000 && compared > 5_000,
        "{changed} changes, {compared} compared"
    );
}

#[test]
fn a_time_of_the_day_fires_once_for_each_day_of_four_years_in_every_zone() {
    for zone in chrono_tz::TZ_VARIANTS {
        let schedule = Schedule::parse("30 2,14 * * *", zone.name()).unwrap();
        let local = |year, month, day| {
            zone.with_ymd_and_hms(year, month, day, 12, 0, 0)
                .unwrap()
                .to_utc()
        };
        let (from, to) = (local(2025, 1, 1), local(2029, 1, 1));
        let fired = schedule.upcoming(from).take_while(|due| *due <= to).count();
        // 1,461 days, whatever the clocks did.
        assert_eq!(fired, 2 * 1_461, "in {zone}");
    }
}

// ------------------------------------------------------------------------------------------------------- clocks that are wrong

/// Sets the database's clock so far ahead of the real one, or behind.
async fn set_clock(pool: &PgPool, ahead: TimeDelta) {
    let seconds = ahead.num_seconds();
    let set = format!(
        "CREATE OR REPLACE FUNCTION postbox.clock() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE \
         RETURN clock_timestamp() + interval '{seconds} seconds'"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(set))
        .execute(pool)
        .await
        .expect("the clock is set");
}

async fn dispatcher(db: &TestDatabase) -> DispatcherHandle {
    Dispatcher::new(db.connect_pool(2))
        .start()
        .await
        .expect("a dispatcher")
}

async fn register(pool: &PgPool, expression: &str) -> DateTime<Utc> {
    let schedule = Schedule::parse(expression, "UTC").expect("a schedule");
    let cron = Cron::new("c", schedule, Outgoing::json("ticks", &7)).missed(Missed::Once);
    let mut tx = pool.begin().await.expect("a transaction");
    let next = tx.register(cron).await.expect("registered");
    tx.commit().await.expect("committed");
    next.expect("a next due time")
}

/// The due times that fired, in the order of their firings.
async fn fired(pool: &PgPool) -> Vec<DateTime<Utc>> {
    sqlx::query_scalar(
        "SELECT (headers ->> 'postbox-scheduled-at')::timestamptz FROM postbox.outbox \
         WHERE topic = 'ticks' AND headers ->> 'postbox-cron' = 'c' ORDER BY seq",
    )
    .fetch_all(pool)
    .await
    .expect("the outbox")
}

async fn next_at(pool: &PgPool) -> DateTime<Utc> {
    let mut connection = pool.acquire().await.expect("a connection");
    let found = cron::find(&mut connection, "c").await.expect("the register");
    found.and_then(|found| found.next_at).expect("a next due time")
}

/// Waits until so many due times fired, of those that fulfil a condition.
async fn have_fired(
    pool: &PgPool,
    times: usize,
    which: impl Fn(DateTime<Utc>) -> bool,
) -> Vec<DateTime<Utc>> {
    eventually(SOON, async || {
        let all = fired(pool).await;
        let found: Vec<_> = all.iter().copied().filter(|due| which(*due)).collect();
        if found.len() >= times {
            return Ok(found);
        }
        let next = next_at(pool).await;
        Err(format!(
            "{} of {times}; of {} in all; next at {next}",
            found.len(),
            all.len()
        ))
    })
    .await
}

fn each_once(fired: &[DateTime<Utc>]) {
    let mut times = BTreeMap::new();
    for due in fired {
        *times.entry(*due).or_insert(0) += 1;
    }
    times.retain(|_, n| *n > 1);
    assert!(times.is_empty(), "fired more than once: {times:?}");
}

#[tokio::test]
async fn a_schedule_by_the_second_goes_on_when_the_clock_was_an_hour_ahead_for_seconds() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    register(db.pool(), "* * * * * *").await;
    have_fired(db.pool(), 2, |_| true).await;
    set_clock(db.pool(), TimeDelta::hours(1)).await;
    let ahead = have_fired(db.pool(), 3, |due| due > Utc::now() + TimeDelta::minutes(30)).await;
    set_clock(db.pool(), TimeDelta::zero()).await;
    let back = Utc::now();
    have_fired(db.pool(), 4, |due| due > back && due < ahead[0]).await;
    // What fired ahead does not fire again when its time comes.
    set_clock(db.pool(), ahead[0] - Utc::now() - TimeDelta::seconds(1)).await;
    have_fired(db.pool(), 3, |due| due > ahead[2]).await;
    dispatcher.shutdown().await;
    let fired = fired(db.pool()).await;
    assert!(ahead.iter().all(|due| fired.contains(due)));
    each_once(&fired);
}

#[tokio::test]
async fn a_next_time_that_was_computed_by_a_clock_400_days_ahead_comes_back() {
    let db = TestDatabase::new().await.unwrap();
    let soon = || Utc::now() + TimeDelta::days(2);
    let comes_back = async || {
        eventually(SOON, async || match next_at(db.pool()).await {
            next if next < soon() => Ok(()),
            next => Err(format!("next at {next}")),
        })
        .await;
    };
    // Registered while it was ahead, without a dispatcher.
    set_clock(db.pool(), TimeDelta::days(400)).await;
    assert!(register(db.pool(), "0 0 * * *").await > soon());
    set_clock(db.pool(), TimeDelta::zero()).await;
    let dispatcher = dispatcher(&db).await;
    comes_back().await;
    // Fired while it was ahead.
    set_clock(db.pool(), TimeDelta::days(400)).await;
    let due = have_fired(db.pool(), 1, |due| due > soon()).await;
    set_clock(db.pool(), TimeDelta::zero()).await;
    comes_back().await;
    // Paused while it was ahead, and changed after.
    set_clock(db.pool(), TimeDelta::days(500)).await;
    have_fired(db.pool(), 2, |due| due > soon()).await;
    let mut connection = db.connect().await.unwrap();
    assert!(cron::pause(&mut connection, "c").await.unwrap());
    set_clock(db.pool(), TimeDelta::zero()).await;
    assert!(cron::resume(&mut connection, "c").await.unwrap());
    assert!(next_at(db.pool()).await < soon(), "resumed");
    assert!(
        register(db.pool(), "30 0 * * *").await < soon(),
        "registered anew"
    );
    // In 400 days, what has fired then has fired.
    register(db.pool(), "0 0 * * *").await;
    set_clock(db.pool(), due[0] - Utc::now() - TimeDelta::hours(1)).await;
    eventually(SOON, async || match next_at(db.pool()).await {
        next if next > due[0] => Ok(()),
        next => Err(format!("next at {next}")),
    })
    .await;
    dispatcher.shutdown().await;
    each_once(&fired(db.pool()).await);
}

#[tokio::test]
async fn a_clock_that_is_set_back_makes_no_due_time_fire_again_and_leaves_none_out() {
    let db = TestDatabase::new().await.unwrap();
    set_clock(db.pool(), TimeDelta::seconds(100)).await;
    let dispatchers = [dispatcher(&db).await, dispatcher(&db).await];
    let first = register(db.pool(), "* * * * * *").await;
    for (n, ahead) in [96, 93, 90].into_iter().enumerate() {
        have_fired(db.pool(), 4 * (n + 1), |_| true).await;
        set_clock(db.pool(), TimeDelta::seconds(ahead)).await;
    }
    let last = *fired(db.pool()).await.last().unwrap();
    have_fired(db.pool(), 3, |due| due > last).await;
    for dispatcher in dispatchers {
        dispatcher.shutdown().await;
    }
    for (n, due) in fired(db.pool()).await.into_iter().enumerate() {
        assert_eq!(due, first + TimeDelta::seconds(i64::try_from(n).unwrap()));
    }
}
