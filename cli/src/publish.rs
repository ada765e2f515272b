//! `postbox publish`

mod lines;

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, anyhow};
use chrono::{DateTime, Utc};
use postbox::{MessageId, Outgoing, Publish};
use sqlx::{PgPool, PgTransaction};
use tokio::sync::mpsc::Receiver;

pub(crate) use self::lines::is_json;
use self::lines::{BadLine, Body, Format, Line};
use crate::database::Database;
use crate::output::{Output, warn};
use crate::span;
use crate::usage::{name, wrong_usage};

/// Most lines in one transaction.
const TRANSACTION: usize = 1_000;

/// Publish messages to a topic and print their ids
///
/// With --payload TEXT one message. With - (also when no payload is given and standard input is not a terminal) one message a line of
/// standard input, empty lines aside, in transactions of up to 1,000 lines: everything before a line that is refused is published, nothing
/// from it on. Ids are printed once their transaction has committed.
///
///   postbox publish orders --key 42 --type order.placed --payload '{"id": 42}'
///   postbox publish orders --key-field id < orders.jsonl
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Topic: 1 to 255 characters of A-Z a-z 0-9 . _ - : /
    #[arg(value_parser = name)]
    topic: String,
    /// Read messages from standard input, one a line
    #[arg(value_name = "-", value_parser = ["-"], conflicts_with = "payload", hide_possible_values = true)]
    input: Option<String>,
    /// The payload of one message; - reads standard input
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    payload: Option<String>,
    /// Ordering key, up to 1,024 bytes: messages of one key are handled one after another, in their order [default: none]
    #[arg(long, conflicts_with = "key_field")]
    key: Option<String>,
    /// Take the key from this top-level field of each JSON payload: a text, number or boolean
    #[arg(long, value_name = "NAME")]
    key_field: Option<String>,
    /// Message type, in the alphabet of a topic [default: none]
    #[arg(long = "type", value_name = "TYPE", value_parser = name)]
    message_type: Option<String>,
    /// A header; may be given again [default: none]
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// Media type of the payload. A JSON one is checked; of any other the bytes are taken as they are
    #[arg(long, value_name = "MEDIA TYPE", default_value = postbox::JSON)]
    content_type: String,
    /// Publish at most once: for 24 h the same key publishes nothing again and prints the first message's id. For one message
    #[arg(long, value_name = "KEY", conflicts_with_all = ["input", "atomic"])]
    dedup_key: Option<String>,
    /// Deliver at this instant, in RFC 3339 (2026-12-24T18:00:00+01:00); one in the past means now [default: now]
    #[arg(long, value_name = "INSTANT", conflicts_with = "delay")]
    at: Option<DateTime<Utc>>,
    /// Deliver after this span, a number with ms, s, m or h [default: none]
    #[arg(long, value_name = "SPAN", value_parser = span::parse)]
    delay: Option<Duration>,
    /// From this instant on it is not handled any more [default: it does not expire]
    #[arg(long, value_name = "INSTANT", conflicts_with = "expires_in")]
    expires_at: Option<DateTime<Utc>>,
    /// As --expires-at, so long after it is delivered
    #[arg(long, value_name = "SPAN", value_parser = span::parse)]
    expires_in: Option<Duration>,
    /// Publish all lines in one transaction, or none
    #[arg(long)]
    atomic: bool,
    /// Print one JSON object a message: id, and line for standard input
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    let format = Format::new(&args.content_type, args.key_field.clone());
    let payload = args.payload.as_deref().filter(|payload| *payload != "-");
    args.check(&format, payload.is_some());
    let payload = payload
        .map(|text| format.read(text.as_bytes().to_vec()))
        .transpose();
    let payload = payload.map_err(|error| anyhow!("the payload {error}"))?;
    let mut publisher = Publisher {
        pool: database.open(1).await?,
        output: Output::default(),
        args,
    };
    match payload {
        Some(body) => publisher.one(body).await,
        None if publisher.args.atomic => publisher.all_or_none(lines::of_stdin(format)).await,
        None => publisher.up_to_a_bad_one(lines::of_stdin(format)).await,
    }
}

impl Args {
    /// What depends on more than one argument.
    fn check(&self, format: &Format, has_payload: bool) {
        if self.key_field.is_some() && !format.is_json() {
            wrong_usage(
                "--key-field needs JSON payloads: give the key with --key, or leave out --content-type",
            );
        }
        if has_payload {
            return;
        }
        if self.dedup_key.is_some() {
            wrong_usage("--dedup-key is for one message: give its payload with --payload TEXT");
        }
        if self.input.is_none() && self.payload.is_none() && std::io::stdin().is_terminal() {
            wrong_usage(
                "there is nothing to publish: give --payload TEXT, or - to type messages, one a line",
            );
        }
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err("a header is NAME=VALUE".to_owned()),
    }
}

struct Publisher {
    pool: PgPool,
    output: Output,
    args: Args,
}

impl Publisher {
    async fn one(&mut self, body: Body) -> anyhow::Result<()> {
        let message = self.message(&body);
        let mut tx = self.pool.begin().await?;
        let id = tx.publish(message).await?;
        tx.commit().await?;
        self.print(id, None)
    }

    async fn all_or_none(&mut self, mut lines: Receiver<Result<Line, BadLine>>) -> anyhow::Result<()> {
        let mut published = Vec::new();
        let mut tx = self.pool.begin().await?;
        loop {
            let (lines, mut bad) = next_batch(&mut lines).await;
            if lines.is_empty() && bad.is_none() {
                break;
            }
            match self.publish(&mut tx, &lines).await? {
                Ok(ids) => published.extend(ids.into_iter().zip(lines.iter().map(|line| line.number))),
                Err(refused) => bad = Some(refused),
            }
            if let Some(bad) = bad {
                return Err(anyhow!("{bad}; nothing was published"));
            }
        }
        tx.commit().await.context("the transaction did not commit")?;
        warn_if_empty(published.len());
        published
            .into_iter()
            .try_for_each(|(id, number)| self.print(id, Some(number)))
    }

    async fn up_to_a_bad_one(&mut self, mut lines: Receiver<Result<Line, BadLine>>) -> anyhow::Result<()> {
        let mut published = 0;
        loop {
            let (mut lines, mut bad) = next_batch(&mut lines).await;
            if lines.is_empty() && bad.is_none() {
                break;
            }
            let ids = loop {
                let mut tx = self.pool.begin().await?;
                let outcome = self.publish(&mut tx, &lines).await;
                match outcome.with_context(|| so_far(published))? {
                    Ok(ids) => {
                        tx.commit().await.with_context(|| so_far(published))?;
                        break ids;
                    }
                    Err(refused) => {
                        lines.truncate(refused.index_in(&lines));
                        bad = Some(refused);
                    }
                }
            };
            published += ids.len();
            for (id, line) in ids.into_iter().zip(&lines) {
                self.print(id, Some(line.number))?;
            }
            if let Some(bad) = bad {
                return Err(anyhow!(
                    "{bad}; {}, and nothing from this line on",
                    so_far(published)
                ));
            }
        }
        warn_if_empty(published);
        Ok(())
    }

    /// Publishes lines in their order; the inner error is a line that was refused, and none was published.
    async fn publish(
        &self,
        tx: &mut PgTransaction<'_>,
        lines: &[Line],
    ) -> Result<Result<Vec<MessageId>, BadLine>, postbox::Error> {
        let messages: Vec<Outgoing> = lines.iter().map(|line| self.message(&line.body)).collect();
        match tx.publish_all(messages).await {
            Ok(ids) => Ok(Ok(ids)),
            Err(postbox::Error::InBatch { index, source }) => {
                Ok(Err(BadLine::new(lines[index].number, source.to_string())))
            }
            Err(error) => Err(error),
        }
    }

    fn message(&self, body: &Body) -> Outgoing {
        let args = &self.args;
        let mut message = Outgoing::bytes(
            args.topic.clone(),
            args.content_type.clone(),
            body.payload.clone(),
        )
        .headers(args.headers.iter().cloned());
        if let Some(message_type) = &args.message_type {
            message = message.message_type(message_type.clone());
        }
        if let Some(key) = body.key.as_ref().or(args.key.as_ref()) {
            message = message.key(key.clone());
        }
        if let Some(dedup_key) = &args.dedup_key {
            message = message.dedup_key(dedup_key.clone());
        }
        if let Some(instant) = args.at {
            message = message.deliver_at(instant);
        }
        if let Some(delay) = args.delay {
            message = message.delay(delay);
        }
        if let Some(instant) = args.expires_at {
            message = message.expires_at(instant);
        }
        if let Some(span) = args.expires_in {
            message = message.expires_in(span);
        }
        message
    }

    fn print(&mut self, id: MessageId, line: Option<u64>) -> anyhow::Result<()> {
        match (self.args.json, line) {
            (false, _) => self.output.line(&id),
            (true, None) => self.output.line(&serde_json::json!({ "id": id })),
            (true, Some(line)) => self.output.line(&serde_json::json!({ "id": id, "line": line })),
        }
    }
}

/// The lines that are there, up to a transaction's worth, and the bad one after them; nothing at the end of the input.
///
/// While a transaction is under way the next lines gather, so transactions are large when there is much to publish, and a single line
/// never waits for others.
async fn next_batch(lines: &mut Receiver<Result<Line, BadLine>>) -> (Vec<Line>, Option<BadLine>) {
    let mut read = Vec::new();
    lines.recv_many(&mut read, TRANSACTION).await;
    let mut good = Vec::with_capacity(read.len());
    for line in read {
        match line {
            Ok(line) => good.push(line),
            Err(bad) => return (good, Some(bad)),
        }
    }
    (good, None)
}

fn so_far(published: usize) -> String {
    match published {
        0 => "nothing was published before".to_owned(),
        1 => "1 message was published before".to_owned(),
        published => format!("{published} messages were published before"),
    }
}

fn warn_if_empty(published: usize) {
    if published == 0 {
        warn("standard input was empty, so nothing was published");
    }
}
