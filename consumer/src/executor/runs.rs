//! Tasks: runs that are under way, and reads beside them.

use std::collections::{HashMap, HashSet};

use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use super::catch_up::Loaded;
use super::ready::Jobs;
use crate::connections::Checkout;
use crate::executor::settlement::Verdict;
use crate::ids::Lane;

/// What is under way beside the executor's own task.
#[derive(Default)]
pub(super) struct Runs {
    tasks: JoinSet<Ended>,
    running: HashMap<Id, Running>,
    /// Connections that the next transactional handlers take over from those before.
    checkouts: Vec<Checkout>,
}

/// A run that is a task of its own.
pub(super) struct Running {
    abort: AbortHandle,
    /// Offset of its first message.
    pub(super) first: i64,
    /// The lane of each of its messages.
    pub(super) lanes: Vec<Lane>,
}

/// What a task did.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are runs, and a box would cost each of them"
)]
pub(super) enum Ended {
    Run {
        jobs: Jobs,
        verdict: Verdict,
        checkout: Option<Checkout>,
    },
    Loaded(Loaded),
}

/// With the task's number, unless it was aborted.
pub(super) type Joined = Result<(Id, Ended), JoinError>;

impl Runs {
    /// How many messages or batches run.
    pub(super) fn len(&self) -> usize {
        self.running.len()
    }

    /// Nothing is under way, reads included.
    pub(super) fn is_idle(&self) -> bool {
        self.tasks.is_empty()
    }

    pub(super) fn start(
        &mut self,
        jobs: Jobs,
        run: impl Future<Output = (Verdict, Option<Checkout>)> + Send + 'static,
    ) {
        let first = jobs.first.offset;
        let lanes = jobs.iter().map(|job| job.lane).collect();
        let abort = self.tasks.spawn(async move {
            let (verdict, checkout) = run.await;
            Ended::Run {
                jobs,
                verdict,
                checkout,
            }
        });
        self.running.insert(abort.id(), Running { abort, first, lanes });
    }

    /// A read beside the runs.
    pub(super) fn load(&mut self, load: impl Future<Output = Loaded> + Send + 'static) {
        self.tasks.spawn(async move { Ended::Loaded(load.await) });
    }

    /// The next that ends; nothing, if nothing is under way.
    pub(super) async fn next_ended(&mut self) -> Option<Joined> {
        self.tasks.join_next_with_id().await
    }

    /// One that has ended.
    pub(super) fn one_ended(&mut self) -> Option<Joined> {
        self.tasks.try_join_next_with_id()
    }

    /// The run that a task was.
    pub(super) fn take(&mut self, task: Id) -> Option<Running> {
        self.running.remove(&task)
    }

    /// Aborts the runs of lanes; gives all the lanes whose messages were in them.
    pub(super) fn abort(&mut self, lanes: &[Lane]) -> HashSet<Lane> {
        let mut aborted = HashSet::new();
        for run in self.running.values().filter(|run| run.is_of(lanes)) {
            run.abort.abort();
            aborted.extend(run.lanes.iter().copied());
        }
        aborted
    }

    pub(super) fn any_of(&self, lanes: &[Lane]) -> bool {
        self.running.values().any(|run| run.is_of(lanes))
    }

    /// Cancels all; they have ended when it returns.
    pub(super) async fn shutdown(&mut self) {
        self.tasks.shutdown().await;
    }

    /// A connection with an open transaction, for the next transactional run.
    pub(super) fn checkout(&mut self) -> Option<Checkout> {
        self.checkouts.pop().filter(Checkout::may_stay)
    }

    /// For the next run. Dropped, it is the pool's again.
    pub(super) fn keep(&mut self, checkout: Option<Checkout>) {
        self.checkouts.extend(checkout.filter(Checkout::may_stay));
    }

    /// Nothing is kept from the pool that nothing is ready for.
    pub(super) fn hand_back(&mut self, progressed: bool) {
        self.checkouts
            .retain(|checkout| progressed && checkout.may_stay());
    }
}

impl Running {
    fn is_of(&self, lanes: &[Lane]) -> bool {
        self.lanes.iter().any(|lane| lanes.contains(lane))
    }
}
