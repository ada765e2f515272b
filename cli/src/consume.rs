//! `postbox consume`

mod command;
mod line;
mod printer;
mod quota;
mod work;

use std::sync::Arc;
use std::time::Duration;

use clap::{ArgGroup, ValueEnum};
use postbox_consumer::{
    Consumer, DEFAULT_MAX_ATTEMPTS, Delivery, Exhausted, Extract, HandlerDefinition, Invocation,
    MessageOrder, Position, Raw, Retry, UnknownType,
};
use postbox_dispatcher::{Dispatcher, status};
use sqlx::PgPool;

use self::command::ShellCommand;
use self::printer::{Printer, until_reader_is_gone};
use self::quota::Quota;
use self::work::{Sink, Work};
use crate::database::Database;
use crate::output::warn;
use crate::usage::name;
use crate::{shutdown, span};

/// A line that waits for a slow reader of standard output is not late.
const PRINT_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long a line may still wait for its reader once the program is to stop.
const PRINT_GRACE: Duration = Duration::from_secs(5);
const KILL_GRACE: Duration = Duration::from_secs(5);
const PRINT_CONCURRENCY: usize = 1;
const EXEC_CONCURRENCY: usize = 8;

/// Print the messages of a topic, one a line, or run a command for each
///
/// A line has, separated by tabs: id, topic, offset, type, key, headers, attempt, published_at, payload. What is missing is "-". Tabs and
/// newlines within JSON are spaces, elsewhere \t and \n; a payload that is not text is base64:…. A message is acknowledged once its line is
/// written.
///
/// With --exec the command gets the payload on standard input and POSTBOX_ID, POSTBOX_TOPIC, POSTBOX_OFFSET, POSTBOX_TYPE, POSTBOX_KEY,
/// POSTBOX_ATTEMPT, POSTBOX_HEADERS (a JSON object), POSTBOX_CONTENT_TYPE and POSTBOX_PUBLISHED_AT in its environment; what a message does
/// not have is not set. Exit status 0 acknowledges the message; 75 (EX_TEMPFAIL) tries it again in 5 s as if it had not run; 65 (EX_DATAERR)
/// sends it to the dead letters; any other retries it after 1 s, 2 s, 4 s … up to 10 min, and after --max-attempts it is a dead letter. Later
/// messages of its key wait meanwhile.
///
/// Stops on SIGINT, SIGTERM (a second one stops at once), --max, --idle-timeout, and when the reader of standard output is gone. What was
/// not acknowledged is delivered again. Messages come only while a dispatcher runs (`postbox run`).
///
///   postbox consume orders --group peek --json | jq .payload
///   postbox consume orders --group mail --exec './send-receipt'
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment, group(ArgGroup::new("audience").required(true).args(["group", "broadcast"])))]
pub(crate) struct Args {
    /// Topic: 1 to 255 characters of A-Z a-z 0-9 . _ - : /
    #[arg(value_parser = name)]
    topic: String,
    /// Consumer group: each message goes to one of its instances, and the group goes on where it stopped
    #[arg(long, value_parser = name)]
    group: Option<String>,
    /// Get every message, whatever others get, and remember nothing
    #[arg(long)]
    broadcast: bool,
    /// Where a NEW group or a broadcast begins: earliest, latest, a time (RFC 3339), a span ago (90m) or an offset [default: earliest; --broadcast: latest]
    #[arg(long, value_name = "WHERE", value_parser = crate::position::parse)]
    from: Option<Position>,
    /// Only messages of this type; may be given again. The group skips all others that no live instance of it takes, for good [default: all]
    #[arg(long = "type", value_name = "TYPE", value_parser = name)]
    types: Vec<String>,
    /// Only messages of which this says true, in SQL/JSON path over {headers, payload, key, type}, such as '$.payload.total > 100'. The group skips all
    /// others, for good [default: all]
    #[arg(long, value_name = "CONDITION")]
    filter: Option<String>,
    /// What is handled one after another: messages of one key, all messages of the topic, or none
    #[arg(long, value_enum, default_value_t = OrderArg::Key)]
    order: OrderArg,
    /// How many messages at once [default: 1, which prints them by offset; with --exec 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    concurrency: Option<u16>,
    /// Run this for each message with sh -c
    #[arg(long, value_name = "COMMAND", conflicts_with = "json")]
    exec: Option<String>,
    /// How long one run of the command may take; then it is killed and has failed
    #[arg(long, value_name = "SPAN", default_value = "60s", value_parser = timeout, requires = "exec")]
    timeout: Duration,
    /// Attempts in all before a message goes to the dead letters
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_ATTEMPTS, value_parser = clap::value_parser!(u32).range(1..), requires = "exec")]
    max_attempts: u32,
    /// Whether the key of a dead letter goes on, or waits for an operator (`postbox dead-letters`)
    #[arg(long, value_enum, default_value_t = ExhaustedArg::Skip, requires = "exec")]
    exhausted: ExhaustedArg,
    /// Stop after so many messages, acknowledged or given up; exactly these are done with [default: no end]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max: Option<u32>,
    /// Stop when nothing happened for so long: a number of seconds, or a span such as 500ms [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = span::parse)]
    idle_timeout: Option<Duration>,
    /// Run a dispatcher in this process too, to try things out
    #[arg(long)]
    dispatch: bool,
    /// Print one JSON object a line: the same fields, content_type, and payload, or payload_base64 where the payload is not JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OrderArg {
    Key,
    Topic,
    None,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ExhaustedArg {
    Skip,
    Halt,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    let pool = database.open_direct(2).await?;
    let dispatcher = match args.dispatch {
        true => Some(Dispatcher::new(pool.clone()).start().await?),
        false => {
            warn_without_dispatcher(&pool).await?;
            None
        }
    };
    let (sink, failure) = match &args.exec {
        Some(command) => (Sink::Run(ShellCommand::new(command, args.timeout)), None),
        None => {
            let (printer, failure) = Printer::start(args.json, stop.clone());
            (Sink::Print(printer), Some(failure))
        }
    };
    let quota = args.max.map(|max| Quota::new(max, stop.clone()));
    let work = Arc::new(Work::new(sink, quota, !args.types.is_empty(), args.max_attempts));
    let grace = if args.exec.is_some() {
        Duration::from_secs(30)
    } else {
        PRINT_GRACE
    };
    let consumer = Consumer::new(pool)
        .handlers([args.handler(work.clone())])
        .shutdown_grace(grace)
        .run(stop.clone());
    let printing = args.exec.is_none();
    let stop_by_itself = async {
        tokio::select! {
            () = work.until_idle(args.idle_timeout) => {}
            () = until_reader_is_gone(), if printing => {}
        }
        stop.cancel();
        std::future::pending().await
    };
    tokio::select! {
        ended = consumer => ended?,
        () = stop_by_itself => {}
    }
    if let Some(dispatcher) = dispatcher {
        dispatcher.shutdown().await;
    }
    failure.map_or(Ok(()), |failure| failure.check())
}

async fn warn_without_dispatcher(pool: &PgPool) -> anyhow::Result<()> {
    if status::dispatchers(pool).await? == 0 {
        warn(
            "no dispatcher is connected, so no new message comes: run `postbox run`, or give --dispatch to try things out",
        );
    }
    Ok(())
}

impl Args {
    fn handler(&self, work: Arc<Work>) -> HandlerDefinition {
        let (concurrency, timeout) = match self.exec {
            // The command has its own, after which its message is counted.
            Some(_) => (EXEC_CONCURRENCY, self.timeout.saturating_add(KILL_GRACE)),
            None => (PRINT_CONCURRENCY, PRINT_TIMEOUT),
        };
        let mut handler = HandlerDefinition::new("consume")
            .topic(self.topic.clone())
            .order(self.order.into())
            .concurrency(self.concurrency.map_or(concurrency, usize::from))
            .timeout(timeout)
            .retry(
                Retry::default()
                    .max_attempts(self.max_attempts)
                    .exhausted(match self.exhausted {
                        ExhaustedArg::Skip => Exhausted::Skip,
                        ExhaustedArg::Halt => Exhausted::Halt,
                    }),
            )
            .call(move |invocation| Box::pin(take(work.clone(), invocation)));
        handler = match &self.group {
            Some(group) => handler.group(group.clone()),
            None => handler.broadcast(),
        };
        if let Some(filter) = &self.filter {
            handler = handler.filter(filter.clone());
        }
        if let Some(start) = self.from {
            handler = handler.start(start);
        }
        if !self.types.is_empty() {
            // What nobody in the group asks for is skipped.
            handler = handler.unknown(UnknownType::Settle);
        }
        self.types.iter().fold(handler, |handler, message_type| {
            handler.message_type(message_type.clone())
        })
    }
}

async fn take(work: Arc<Work>, mut invocation: Invocation) -> postbox_consumer::Outcome {
    let delivery = <Delivery as Extract>::extract(&mut invocation).await?;
    let raw = <Raw as Extract>::extract(&mut invocation).await?;
    work.take(delivery, raw).await
}

impl From<OrderArg> for MessageOrder {
    fn from(order: OrderArg) -> Self {
        match order {
            OrderArg::Key => MessageOrder::Key,
            OrderArg::Topic => MessageOrder::Topic,
            OrderArg::None => MessageOrder::None,
        }
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    let timeout = span::parse(text)?;
    if timeout.is_zero() {
        return Err("the timeout is more than zero".to_owned());
    }
    Ok(timeout)
}
