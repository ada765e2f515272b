//! What a session writes: heartbeats, checkpoints, what it gives back.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::lost::{Lost, in_time, in_time_for};
use super::process::Process;
use super::{HEARTBEAT, LEAVE, Session, own_lease, report};
use crate::executor::{Command, Event};
use crate::ids::SubscriptionId;
use crate::protocol::progress::Snapshot;
use crate::session::record::{Columns, Reporter};

impl Session {
    /// Writes what the executors reported; `false` if some lane turned out to have another owner, or is to have one.
    pub(super) async fn checkpoint(&mut self) -> Result<bool, Lost> {
        self.write_reports(|_, _| ()).await
    }

    pub(super) async fn write_reports(
        &mut self,
        mut seen: impl FnMut(SubscriptionId, &Snapshot),
    ) -> Result<bool, Lost> {
        self.checkpointed = Instant::now();
        let mut columns = Columns::default();
        let mut written = Vec::new();
        // Who is to own a lane may be another now.
        let mut needs_changed = false;
        for (n, service) in self.services.iter().enumerate() {
            if let Some(unwritten) = service.progress.take() {
                if let Some(snapshot) = &unwritten.snapshot {
                    seen(service.id, snapshot);
                }
                needs_changed |= !unwritten.journal.needs.is_empty();
                written.push((n, unwritten.number));
                columns.push(service.id, unwritten);
            }
        }
        if columns.is_empty() {
            return Ok(true);
        }
        let reporter = Reporter {
            consumer: self.id,
            instance: &self.name,
        };
        let weight = columns.weight();
        let query = columns.write(&mut self.listener, reporter);
        let complete = in_time_for(weight, &self.lease, query).await?;
        for (n, number) in written {
            self.services[n].command(Command::Recorded(number));
        }
        Ok(complete && !needs_changed)
    }

    pub(super) async fn release(
        &mut self,
        subscription: SubscriptionId,
        snapshot: Snapshot,
    ) -> Result<(), Lost> {
        let Some(service) = self
            .services
            .iter_mut()
            .find(|service| service.id == subscription)
        else {
            return Ok(());
        };
        let mut columns = Columns::default();
        columns.push_snapshot(service.id, snapshot);
        for (lane, epoch) in columns.lanes.iter().zip(&columns.epochs) {
            service.claims.give_up(*lane, *epoch);
        }
        let query = sqlx::query("SELECT postbox.release($1, $2, $3, $4, $5, $6, $7)")
            .bind(self.id)
            .bind(subscription)
            .bind(columns.lanes)
            .bind(columns.epochs)
            .bind(columns.positions)
            .bind(columns.pending)
            .bind(columns.lanes_of_pending)
            .execute(&mut self.listener);
        in_time(&self.lease, query).await?;
        Ok(())
    }

    /// Lets the handlers finish, records how far it came, gives the lanes away and signs off.
    pub(super) async fn stop(&mut self, process: &Process) -> Result<(), Lost> {
        let leave = sqlx::query(LEAVE).bind(self.id).execute(&mut self.listener);
        in_time(&self.lease, leave).await?;
        let grace = process.settings.grace;
        for service in &self.services {
            service.command(Command::Stop(grace));
        }
        // Handlers may need longer than the lease, and some runs wait for their attempt to be recorded.
        let mut last = HashMap::new();
        loop {
            let ended = self.services.iter().all(|service| service.task.is_finished());
            self.heartbeat(process).await?;
            self.write_reports(|subscription, snapshot| {
                last.insert(subscription, snapshot.clone());
            })
            .await?;
            if ended {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        while let Ok(event) = self.events.try_recv() {
            if let Event::Released {
                subscription,
                snapshot,
            } = event
            {
                self.release(subscription, snapshot).await?;
            }
        }
        for (subscription, snapshot) in last {
            self.release(subscription, snapshot).await?;
        }
        let query = sqlx::query("DELETE FROM postbox.consumer WHERE id = $1")
            .bind(self.id)
            .execute(&mut self.listener);
        in_time(&self.lease, query).await?;
        Ok(())
    }

    /// Says that it is alive, in time before the lease ends.
    pub(super) async fn heartbeat(&mut self, process: &Process) -> Result<(), Lost> {
        if self.heartbeat_at.elapsed() > own_lease(self.lease_span) {
            return Err(Lost::from(
                "this instance did not run for longer than its lease".to_owned(),
            ));
        }
        if self.heartbeat_at.elapsed() < self.lease_span / 4 {
            return Ok(());
        }
        let sent = Instant::now();
        let query = sqlx::query_scalar(HEARTBEAT)
            .bind(self.id)
            .bind(report(process))
            .bind(self.heartbeat)
            .fetch_one(&mut self.listener);
        self.heartbeat = in_time(&self.lease, query).await?;
        if self.heartbeat.is_none() {
            return Err(Lost::from("this instance's registration is gone".to_owned()));
        }
        self.heartbeat_at = sent;
        self.lease.extend(sent + own_lease(self.lease_span));
        Ok(())
    }
}
