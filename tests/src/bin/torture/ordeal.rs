//! The ordeal: starts everything, strikes by the plan, heals, waits for rest, and has it judged.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use postbox_testkit::{TestDatabase, TestPostgres};
use sqlx::AssertSqlSafe;
use sqlx::postgres::PgConnectOptions;
use tokio::task::JoinHandle;

use crate::OrdealArgs;
use crate::clock;
use crate::evidence::Evidence;
use crate::fleet::Fleet;
use crate::history::{Line, Log};
use crate::ledger::{ADD_ACCOUNTS, TABLES};
use crate::message::LEDGER_KEY;
use crate::plan::{self, Crash, Fault, Strike, Target};
use crate::quiescence;
use crate::report::Report;
use crate::verdict::{self, Verdict};

/// How long it may take until everything is settled once all is healed: leases end, retries wait, backlogs are worked off.
const REST_LIMIT: Duration = Duration::from_secs(120);
/// How long nodes may take then for what they have not seen yet.
const NODES_LIMIT: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Whoever prepared a transaction ends it sooner, if at all.
const PREPARED_FOR_S: f64 = 4.0;
/// The name under which this process keeps its own history.
const SELF: &str = "ordeal";

/// `false`: a guarantee was broken.
pub(crate) async fn run(args: OrdealArgs) -> anyhow::Result<bool> {
    let folder = make_folder(&args)?;
    let mut ordeal = Ordeal::begin(&args, folder.clone()).await?;
    ordeal.torture(Duration::from_secs(args.seconds)).await?;
    ordeal.heal().await?;
    let unsettled = ordeal.rest().await?;
    let verdict = ordeal.judge().await?;
    let report = Report {
        seed: args.seed,
        seconds: args.seconds,
        verdict: &verdict,
        unsettled: unsettled.as_deref(),
        oddities: &ordeal.fleet.oddities,
    };
    if args.json {
        println!("{}", report.to_json());
    } else {
        print!("{}", report.to_text());
    }
    let passed = report.passed();
    if !passed {
        eprintln!("seed {} broke a guarantee", args.seed);
        for finding in verdict.findings.iter().take(20) {
            eprintln!("  {finding}");
        }
        if let Some(left) = &unsettled {
            eprintln!("  it did not come to rest within {REST_LIMIT:?}: {left}");
        }
        fs::write(folder.join("findings"), verdict.findings.join("\n"))?;
        ordeal.dump().await;
    }
    if passed && !args.keep {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    } else {
        eprintln!("the logs are in {}", folder.display());
    }
    Ok(passed)
}

fn make_folder(args: &OrdealArgs) -> anyhow::Result<PathBuf> {
    let folder = args.logs.clone().unwrap_or_else(|| {
        let name = format!("postbox-torture-{}-{}", args.seed, std::process::id());
        std::env::temp_dir().join(name)
    });
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let is_empty = fs::read_dir(&folder)?.next().is_none();
    anyhow::ensure!(
        is_empty,
        "{} is not empty: name a folder of its own for the logs",
        folder.display()
    );
    Ok(folder)
}

struct Ordeal {
    seed: u64,
    folder: PathBuf,
    database: TestDatabase,
    log: Log,
    fleet: Fleet,
    /// What undoes a strike, and when.
    afterwards: Vec<(Instant, Then)>,
    restarting: Option<JoinHandle<Result<(), postbox_testkit::Error>>>,
}

enum Then {
    Start(Target),
    Thaw(String),
    Clear(String),
}

impl Ordeal {
    async fn begin(args: &OrdealArgs, folder: PathBuf) -> anyhow::Result<Self> {
        // With fsync, as in earnest. A killed server would keep what it wrote without it too, because the kernel does; but the time that
        // commits take is part of what is tried here.
        let server = TestPostgres::builder()
            .setting("fsync", "on")
            .setting("max_connections", "200")
            .setting("max_prepared_transactions", "64")
            .start()
            .await?;
        let database = server.database().await?;
        sqlx::raw_sql(TABLES).execute(database.pool()).await?;
        if let Some(file) = &args.sabotage {
            let sql = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(database.pool()).await?;
        }
        let keys: Vec<String> = (0..plan::KEYS)
            .map(plan::key)
            .chain([LEDGER_KEY.to_owned()])
            .collect();
        sqlx::query(ADD_ACCOUNTS)
            .bind(keys)
            .execute(database.pool())
            .await?;
        let options: PgConnectOptions = database.url().parse()?;
        let log = Log::create(&folder, SELF)?;
        let mut fleet = Fleet::new(folder.clone(), args.seed, options, log.clone());
        for (target, count) in CREW {
            for _ in 0..count {
                fleet.start(target).await?;
            }
        }
        Ok(Self {
            seed: args.seed,
            folder,
            database,
            log,
            fleet,
            afterwards: Vec::new(),
            restarting: None,
        })
    }

    async fn torture(&mut self, span: Duration) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut strikes = plan::strikes(self.seed, span).into_iter().peekable();
        let mut looked_after = Instant::now();
        while begun.elapsed() < span {
            while let Some(strike) = strikes.next_if(|strike| strike.at <= begun.elapsed()) {
                self.strike(&strike).await?;
            }
            self.look_after().await?;
            if looked_after.elapsed() > Duration::from_secs(1) {
                looked_after = Instant::now();
                let (pool, seed) = (self.database.pool().clone(), self.seed);
                // The server may be down; there is a next time.
                tokio::spawn(async move { quiescence::decide_prepared(&pool, seed, PREPARED_FOR_S).await });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Does what is due, and starts again what ended by itself.
    async fn look_after(&mut self) -> anyhow::Result<()> {
        for target in self.fleet.reap() {
            self.afterwards
                .push((Instant::now() + Duration::from_secs(1), Then::Start(target)));
        }
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.afterwards)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        self.afterwards = later;
        for (_, then) in due {
            match then {
                Then::Start(target) => self.fleet.start(target).await?,
                Then::Thaw(instance) => self.fleet.thaw(&instance),
                Then::Clear(instance) => self.fleet.clear(&instance),
            }
        }
        Ok(())
    }

    async fn strike(&mut self, strike: &Strike) -> anyhow::Result<()> {
        let hit = match strike.fault {
            Fault::Kill { target, back_after } => self.at(target, strike.pick, |ordeal, index| {
                ordeal.fleet.kill(index);
                ordeal.then(back_after, Then::Start(target));
            }),
            Fault::Stop { target, back_after } => self.at(target, strike.pick, |ordeal, index| {
                ordeal.fleet.stop(index);
                ordeal.then(back_after, Then::Start(target));
            }),
            Fault::Freeze { target, span } => self.at(target, strike.pick, |ordeal, index| {
                let instance = ordeal.fleet.freeze(index, span);
                ordeal.then(span, Then::Thaw(instance));
            }),
            Fault::Cut { target } => self.at(target, strike.pick, |ordeal, index| ordeal.fleet.cut(index)),
            Fault::Stall { target, span } => self.at(target, strike.pick, |ordeal, index| {
                let instance = ordeal.fleet.stall(index, span);
                ordeal.then(span, Then::Clear(instance));
            }),
            Fault::Delay { target, by, span } => self.at(target, strike.pick, |ordeal, index| {
                let instance = ordeal.fleet.delay(index, by, span);
                ordeal.then(span, Then::Clear(instance));
            }),
            Fault::AddConsumer if self.fleet.count(Target::Consumer) < plan::MOST_CONSUMERS => {
                self.fleet.start(Target::Consumer).await?;
                true
            }
            Fault::RemoveConsumer if self.fleet.count(Target::Consumer) > 2 => {
                self.at(Target::Consumer, strike.pick, |ordeal, index| {
                    ordeal.fleet.stop(index)
                })
            }
            Fault::AddConsumer | Fault::RemoveConsumer => false,
            Fault::Postgres { how, down_for } => self.crash(how, down_for),
        };
        if hit {
            self.log.fault(&strike.fault.kind());
        }
        Ok(())
    }

    fn at(&mut self, target: Target, pick: usize, hit: impl FnOnce(&mut Self, usize)) -> bool {
        match self.fleet.pick(target, pick) {
            Some(index) => {
                hit(self, index);
                true
            }
            None => false,
        }
    }

    fn then(&mut self, after: Duration, then: Then) {
        self.afterwards.push((Instant::now() + after, then));
    }

    /// Beside everything else, because a recovery takes its time.
    fn crash(&mut self, how: Crash, down_for: Duration) -> bool {
        if self
            .restarting
            .as_ref()
            .is_some_and(|restart| !restart.is_finished())
        {
            return false;
        }
        let server = self.database.server().clone();
        let (log, from) = (self.log.clone(), clock::now());
        self.restarting = Some(tokio::spawn(async move {
            match how {
                Crash::Immediate => server.stop_immediate().await?,
                Crash::Kill => server.kill().await?,
            }
            tokio::time::sleep(down_for).await;
            let started = server.start().await;
            log.write(&Line::Outage {
                from,
                to: clock::now(),
            });
            started
        }));
        true
    }

    /// From here on nothing is done to the system any more.
    async fn heal(&mut self) -> anyhow::Result<()> {
        if let Some(restart) = self.restarting.take() {
            restart.await??;
        }
        self.database.server().start().await?;
        fs::write(plan::calm_file(&self.folder), "").context("cannot write into the folder of the logs")?;
        self.fleet.heal();
        self.afterwards.clear();
        self.fleet.stop_all(Target::Producer).await;
        for (target, count) in CREW {
            while target != Target::Producer && self.fleet.count(target) < count {
                self.fleet.start(target).await?;
            }
        }
        quiescence::decide_prepared(self.database.pool(), self.seed, 0.0).await
    }

    /// Waits until all is settled; returns what is not, when it has waited too long.
    async fn rest(&mut self) -> anyhow::Result<Option<String>> {
        let since = Instant::now();
        loop {
            self.look_after().await?;
            let left = match quiescence::what_is_left(self.database.pool()).await {
                Ok(None) => break,
                Ok(Some(left)) => left,
                Err(error) => format!("{error:#}"),
            };
            if since.elapsed() > REST_LIMIT {
                return Ok(Some(left));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let since = Instant::now();
        while since.elapsed() < NODES_LIMIT && !verdict::nodes_behind(&self.evidence().await?).is_empty() {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        Ok(None)
    }

    async fn evidence(&self) -> anyhow::Result<Evidence> {
        Evidence::collect(&self.folder, self.database.pool(), self.fleet.instances()).await
    }

    async fn judge(&mut self) -> anyhow::Result<Verdict> {
        let alive = self.fleet.instances();
        self.fleet.stop_all(Target::Consumer).await;
        self.fleet.stop_all(Target::Dispatcher).await;
        let evidence = Evidence::collect(&self.folder, self.database.pool(), alive).await?;
        Ok(verdict::judge(&evidence))
    }

    /// What the database says, beside the logs of a run that failed.
    async fn dump(&self) {
        for (name, query) in DUMPS {
            let rows: Result<Vec<String>, sqlx::Error> =
                sqlx::query_scalar(query).fetch_all(self.database.pool()).await;
            let text = rows.map_or_else(|error| error.to_string(), |rows| rows.join("\n"));
            if let Err(error) = write_dump(&self.folder, name, &text) {
                eprintln!("warning: {error:#}");
            }
        }
    }
}

const CREW: [(Target, usize); 3] = [
    (Target::Dispatcher, plan::DISPATCHERS),
    (Target::Consumer, plan::CONSUMERS),
    (Target::Producer, plan::PRODUCERS),
];

const DUMPS: [(&str, &str); 9] = [
    (
        "consumer",
        "SELECT row_to_json(t)::text FROM postbox.consumer t ORDER BY id",
    ),
    (
        "lane",
        "SELECT row_to_json(t)::text FROM postbox.lane t ORDER BY subscription_id, lane",
    ),
    (
        "checkpoint",
        "SELECT row_to_json(t)::text FROM postbox.checkpoint t ORDER BY id",
    ),
    (
        "settlement",
        "SELECT row_to_json(t)::text FROM postbox.settlement t ORDER BY subscription_id, lane, \"offset\"",
    ),
    (
        "tick",
        "SELECT row_to_json(t)::text FROM postbox.tick t ORDER BY id",
    ),
    (
        "offsets",
        "SELECT json_build_object('topic', s.topic, 'offset', s.base + a.n - 1, 'xid', a.xid, 'seq', a.seq, 'hash', s.keys[a.n], \
             'id', o.id, 'payload', convert_from(o.payload, 'UTF8'), 'sequenced_at', s.sequenced_at)::text \
         FROM postbox.segment s CROSS JOIN LATERAL unnest(s.xids, s.seqs) WITH ORDINALITY AS a (xid, seq, n) \
         LEFT JOIN postbox.outbox o ON o.slot = s.slot AND o.xid = a.xid AND o.seq = a.seq ORDER BY s.topic, s.base, a.n",
    ),
    (
        "redelivery",
        "SELECT row_to_json(t)::text FROM postbox.redelivery t ORDER BY subscription_id, \"offset\"",
    ),
    (
        "parked_key",
        "SELECT row_to_json(t)::text FROM postbox.parked_key t ORDER BY subscription_id, key_hash",
    ),
    (
        "dead_letter",
        "SELECT row_to_json(t)::text FROM postbox.dead_letter t ORDER BY id",
    ),
];

fn write_dump(folder: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let path = folder.join(format!("{name}.table"));
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}
