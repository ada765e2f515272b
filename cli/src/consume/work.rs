//! What is done with each message.

use std::time::Duration;

use postbox_consumer::{Delivery, HandlerError, Outcome, Raw};
use tokio::sync::watch;

use super::command::ShellCommand;
use super::printer::Printer;
use super::quota::Quota;

pub(crate) enum Sink {
    Print(Printer),
    Run(ShellCommand),
}

pub(crate) struct Work {
    sink: Sink,
    quota: Option<Quota>,
    /// Untyped messages go to the only handler there is, but are of none of the types asked for.
    typed_only: bool,
    /// Attempts in all.
    max_attempts: u32,
    /// How many messages are in hand.
    in_hand: watch::Sender<usize>,
}

impl Work {
    pub(crate) fn new(sink: Sink, quota: Option<Quota>, typed_only: bool, max_attempts: u32) -> Self {
        Self {
            sink,
            quota,
            typed_only,
            max_attempts,
            in_hand: watch::Sender::new(0),
        }
    }

    pub(crate) async fn take(&self, delivery: Delivery, raw: Raw) -> Outcome {
        if self.typed_only && delivery.message_type.is_none() {
            return Ok(());
        }
        let _in_hand = InHand::new(&self.in_hand);
        let Some(quota) = &self.quota else {
            return self.sink.take(delivery, raw).await;
        };
        let share = quota.take().await.ok_or_else(not_now)?;
        let is_last = delivery.attempt >= self.max_attempts;
        let outcome = self.sink.take(delivery, raw).await;
        // What is given up is done, too: it does not come again.
        match &outcome {
            Ok(()) => share.used(),
            Err(error) if error.is_final() || (is_last && !error.is_postponed()) => share.used(),
            Err(_) => {}
        }
        outcome
    }

    /// Until no message was in hand for so long; `None`: for ever.
    pub(crate) async fn until_idle(&self, span: Option<Duration>) {
        let Some(span) = span else {
            return std::future::pending().await;
        };
        let mut in_hand = self.in_hand.subscribe();
        loop {
            // It changes with every message, and the sender is ours.
            let changed = in_hand.wait_for(|messages| *messages == 0).await.is_ok();
            if !changed || tokio::time::timeout(span, in_hand.changed()).await.is_err() {
                return;
            }
        }
    }
}

impl Sink {
    async fn take(&self, delivery: Delivery, raw: Raw) -> Outcome {
        match self {
            Sink::Print(printer) => printer.print(&delivery, &raw).await.ok_or_else(not_now),
            Sink::Run(command) => command.run(&delivery, &raw.payload, &raw.content_type).await,
        }
    }
}

/// The program is about to stop: the message stays for the next run.
fn not_now() -> HandlerError {
    HandlerError::postpone(Duration::from_secs(1), "the program stops")
}

struct InHand<'a>(&'a watch::Sender<usize>);

impl<'a> InHand<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|messages| *messages += 1);
        Self(count)
    }
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|messages| *messages -= 1);
    }
}
