//! A run: starts everything, injects faults by the plan, heals, waits for rest, and has it judged.

mod dump;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use postbox_testkit::{TestDatabase, TestPostgres};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::task::JoinHandle;

use crate::RunArgs;
use crate::clock;
use crate::cut_back::{Archive, CutBack};
use crate::evidence::Evidence;
use crate::fleet::Fleet;
use crate::forger;
use crate::history::{Line, Log};
use crate::ledger::{ADD_ACCOUNTS, TABLES};
use crate::message::LEDGER_KEY;
use crate::plan::{self, Crash, Fault, PlannedFault, Target};
use crate::proxy::{Address, Proxy};
use crate::quiescence;
use crate::report::Report;
use crate::server_clock::ServerClock;
use crate::surroundings;
use crate::verdict::{self, Verdict};

/// How long it may take until everything is settled once all is healed: leases end, retries wait, backlogs are worked off.
///
/// The server itself gives up what a client holds that is not heard any more after a minute, and a busy machine needs longer.
const REST_LIMIT: Duration = Duration::from_secs(240);
/// How long nodes may take then for what they have not seen yet.
const NODES_LIMIT: Duration = Duration::from_secs(60);
/// For a setting of the database, unless it is down.
const SETTING_LIMIT: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Whoever prepared a transaction ends it sooner, if at all.
const PREPARED_FOR_S: f64 = 4.0;
/// The name under which this process keeps its own history.
const SELF: &str = "torture";

/// `false`: a guarantee was broken.
pub(crate) async fn run(args: RunArgs) -> anyhow::Result<bool> {
    let folder = make_folder(&args)?;
    let mut run = TortureRun::begin(&args, folder.clone()).await?;
    run.torture(Duration::from_secs(args.seconds)).await?;
    run.heal().await?;
    let unsettled = run.rest().await?;
    let verdict = run.judge().await?;
    let report = Report {
        seed: args.seed,
        seconds: args.seconds,
        verdict: &verdict,
        unsettled: unsettled.as_deref(),
        oddities: &run.fleet.oddities,
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
        run.dump().await;
    }
    if passed && !args.keep {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    } else {
        eprintln!("the logs are in {}", folder.display());
    }
    Ok(passed)
}

fn make_folder(args: &RunArgs) -> anyhow::Result<PathBuf> {
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

struct TortureRun {
    seed: u64,
    folder: PathBuf,
    cut_back: Option<plan::CutBack>,
    database: TestDatabase,
    /// The one that has the database now.
    server: TestPostgres,
    archive: Archive,
    address: Address,
    /// This process's own.
    _proxy: Proxy,
    /// To the database, wherever it is.
    options: PgConnectOptions,
    pool: PgPool,
    log: Log,
    fleet: Fleet,
    /// What undoes a fault, and when.
    afterwards: Vec<(Instant, Then)>,
    /// Something that is done to the server; it returns the one that there is then.
    restarting: Option<JoinHandle<anyhow::Result<TestPostgres>>>,
    server_clock: ServerClock,
}

enum Then {
    Start(Target),
    Thaw(String),
    Clear(String),
    /// The server's clock is right again.
    SetClock,
}

impl TortureRun {
    async fn begin(args: &RunArgs, folder: PathBuf) -> anyhow::Result<Self> {
        // With fsync, as in earnest. A killed server would keep what it wrote without it too, because the kernel does; but the time that
        // commits take is part of what is tried here.
        let server = TestPostgres::builder()
            .setting("fsync", "on")
            .setting("max_connections", "200")
            .setting("max_prepared_transactions", "64");
        let cut_back = args.cut_back.or(plan::CutBack::of(args.seed));
        let (server_clock, server) = ServerClock::prepare(server)?;
        let (archive, server) = Archive::prepare(&folder, cut_back, server)?;
        let server = server.start().await?;
        let database = server.database().await?;
        let direct: PgConnectOptions = database.url().parse()?;
        let address = Address::of(direct.get_port());
        let proxy = Proxy::open(address.clone()).await?;
        let options = direct.host("127.0.0.1").port(proxy.port());
        let pool = PgPoolOptions::new()
            .after_connect(|connection, _| {
                Box::pin(async move {
                    sqlx::raw_sql(surroundings::OWN).execute(connection).await?;
                    Ok(())
                })
            })
            .connect_lazy_with(options.clone());
        sqlx::raw_sql(TABLES).execute(&pool).await?;
        forger::admit(&pool).await?;
        if let Some(file) = &args.sabotage {
            let sql = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await?;
        }
        let keys: Vec<String> = (0..plan::KEYS)
            .map(plan::key)
            .chain([LEDGER_KEY.to_owned()])
            .collect();
        sqlx::query(ADD_ACCOUNTS).bind(keys).execute(&pool).await?;
        let log = Log::create(&folder, SELF)?;
        if plan::begins_perverse(args.seed) {
            surroundings::pervert(&pool, database.name(), u64::MAX).await?;
            log.fault(&Fault::Pervert { which: u64::MAX }.kind());
        }
        let mut fleet = Fleet::new(
            folder.clone(),
            args.seed,
            options.clone(),
            address.clone(),
            log.clone(),
        );
        for (target, count) in CREW {
            for _ in 0..count {
                fleet.start(target).await?;
            }
        }
        Ok(Self {
            seed: args.seed,
            folder,
            cut_back,
            database,
            server,
            archive,
            address,
            _proxy: proxy,
            options,
            pool,
            log,
            fleet,
            afterwards: Vec::new(),
            restarting: None,
            server_clock,
        })
    }

    async fn torture(&mut self, span: Duration) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut faults = plan::faults(self.seed, span, self.cut_back)
            .into_iter()
            .peekable();
        let mut looked_after = Instant::now();
        while begun.elapsed() < span {
            while let Some(planned) = faults.next_if(|planned| planned.at <= begun.elapsed()) {
                self.inject(&planned).await?;
            }
            self.look_after().await?;
            if looked_after.elapsed() > Duration::from_secs(1) {
                looked_after = Instant::now();
                let (pool, seed) = (self.pool.clone(), self.seed);
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
        if self.restarting.as_ref().is_some_and(JoinHandle::is_finished) {
            self.await_server().await?;
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
                Then::SetClock => {
                    // The server may be down; there is a next time.
                    if self.server_clock.set(&self.pool, 0).await.is_err() {
                        self.then(Duration::from_secs(1), Then::SetClock);
                    }
                }
            }
        }
        Ok(())
    }

    async fn inject(&mut self, planned: &PlannedFault) -> anyhow::Result<()> {
        let hit = match planned.fault {
            Fault::Kill { target, back_after } => self.at(target, planned.pick, |run, index| {
                run.fleet.kill(index);
                run.then(back_after, Then::Start(target));
            }),
            Fault::Stop { target, back_after } => self.at(target, planned.pick, |run, index| {
                run.fleet.stop(index);
                run.then(back_after, Then::Start(target));
            }),
            Fault::Freeze { target, span } => self.at(target, planned.pick, |run, index| {
                let instance = run.fleet.freeze(index, span);
                run.then(span, Then::Thaw(instance));
            }),
            Fault::Cut { target } => self.at(target, planned.pick, |run, index| run.fleet.cut(index)),
            Fault::Stall { target, span } => self.at(target, planned.pick, |run, index| {
                let instance = run.fleet.stall(index, span);
                run.then(span, Then::Clear(instance));
            }),
            Fault::Delay { target, by, span } => self.at(target, planned.pick, |run, index| {
                let instance = run.fleet.delay(index, by, span);
                run.then(span, Then::Clear(instance));
            }),
            Fault::AddConsumer if self.fleet.count(Target::Consumer) < plan::MOST_CONSUMERS => {
                self.fleet.start(Target::Consumer).await?;
                true
            }
            Fault::RemoveConsumer if self.fleet.count(Target::Consumer) > 2 => {
                self.at(Target::Consumer, planned.pick, |run, index| run.fleet.stop(index))
            }
            Fault::AddConsumer | Fault::RemoveConsumer => false,
            Fault::Deploy => {
                self.fleet.change_version();
                self.at(Target::Consumer, planned.pick, |run, index| {
                    run.fleet.stop(index);
                    run.then(Duration::ZERO, Then::Start(Target::Consumer));
                })
            }
            Fault::Postgres { how, down_for } => self.crash(how, down_for),
            Fault::Forge { span } => {
                let options = self.options.clone();
                let seed = self.seed ^ planned.pick as u64;
                // The server may be down, or go down.
                tokio::spawn(async move { forger::forge(options, seed, span).await });
                true
            }
            Fault::HalfOpen { target, how, span } => self.at(target, planned.pick, |run, index| {
                let instance = run.fleet.half_open(index, how, span);
                run.then(span, Then::Clear(instance));
            }),
            // The server may be down; then it has not happened.
            Fault::Pervert { which } => {
                let set = surroundings::pervert(&self.pool, self.database.name(), which);
                matches!(tokio::time::timeout(SETTING_LIMIT, set).await, Ok(Ok(())))
            }
            Fault::Unpervert => {
                let set = surroundings::reset(&self.pool, self.database.name());
                matches!(tokio::time::timeout(SETTING_LIMIT, set).await, Ok(Ok(())))
            }
            Fault::CutBack { how, by } => {
                // It comes once, so it waits for its turn.
                self.await_server().await?;
                self.take_back(how, by);
                true
            }
            Fault::Clock { by, span } => {
                self.then(span, Then::SetClock);
                self.server_clock.set(&self.pool, by).await.is_ok()
            }
        };
        if hit {
            self.log.fault(&planned.fault.kind());
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
        if self.restarting.is_some() {
            return false;
        }
        let server = self.server.clone();
        let (log, from) = (self.log.clone(), clock::now());
        self.restarting = Some(tokio::spawn(async move {
            match how {
                // With a clock that is read from a file, in signal handlers too, it may hang.
                Crash::Immediate => match server.stop_immediate().await {
                    Ok(()) => {}
                    Err(_) => server.kill().await?,
                },
                Crash::Kill => server.kill().await?,
            }
            tokio::time::sleep(down_for).await;
            let started = server.start().await;
            log.write(&Line::Outage {
                from,
                to: clock::now(),
            });
            started?;
            Ok(server)
        }));
        true
    }

    /// Beside everything else, too.
    fn take_back(&mut self, how: plan::CutBack, by: Duration) {
        let cut_back = CutBack {
            server: self.server.clone(),
            database: self.database.name().to_owned(),
            address: self.address.clone(),
            archive: self.archive.clone(),
            log: self.log.clone(),
        };
        self.restarting = Some(tokio::spawn(cut_back.run(how, by)));
    }

    /// Waits for the end of what is done to the server.
    async fn await_server(&mut self) -> anyhow::Result<()> {
        if let Some(restarting) = self.restarting.take() {
            self.server = restarting.await??;
        }
        Ok(())
    }

    /// From here on nothing is done to the system any more.
    async fn heal(&mut self) -> anyhow::Result<()> {
        self.await_server().await?;
        self.server.start().await?;
        self.server_clock.set(&self.pool, 0).await?;
        fs::write(plan::calm_file(&self.folder), "").context("cannot write into the folder of the logs")?;
        self.fleet.heal();
        self.afterwards.clear();
        // With these it has to come to rest, on connections that began with them.
        let settings = if plan::begins_perverse(self.seed) {
            u64::MAX
        } else {
            0
        };
        surroundings::pervert(&self.pool, self.database.name(), settings).await?;
        self.fleet.cut_all();
        self.fleet.stop_all(Target::Producer).await;
        self.fleet.be_complete().await?;
        for (target, count) in CREW {
            while target != Target::Producer && self.fleet.count(target) < count {
                self.fleet.start(target).await?;
            }
        }
        quiescence::decide_prepared(&self.pool, self.seed, 0.0).await
    }

    /// Waits until all is settled; returns what is not, when it has waited too long.
    async fn rest(&mut self) -> anyhow::Result<Option<String>> {
        let since = Instant::now();
        loop {
            self.look_after().await?;
            let left = match quiescence::what_is_left(&self.pool).await {
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
        Evidence::collect(&self.folder, &self.pool, self.fleet.instances()).await
    }

    async fn judge(&mut self) -> anyhow::Result<Verdict> {
        let alive = self.fleet.instances();
        self.fleet.stop_all(Target::Consumer).await;
        self.fleet.stop_all(Target::Dispatcher).await;
        let evidence = Evidence::collect(&self.folder, &self.pool, alive).await?;
        Ok(verdict::judge(&evidence))
    }
}

const CREW: [(Target, usize); 3] = [
    (Target::Dispatcher, plan::DISPATCHERS),
    (Target::Consumer, plan::CONSUMERS),
    (Target::Producer, plan::PRODUCERS),
];
