//! What the others do: a look at the database, and which lanes are claimed and given back for it.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use tracing::{info, warn};

use super::lost::{Lost, in_time};
use super::process::Process;
use super::{ClaimedRow, HEADS_EVERY, LOOK, LOOK_EVERY, LOOK_SOON, LaneOf, Look, Session};
use crate::executor::{Claim, Command};
use crate::handler::router::Takes;
use crate::ids::{ConsumerId, Epoch, Lane, SubscriptionId};
use crate::lane::OwnedLane;
use crate::protocol::redelivery;
use crate::session::claims::{LaneRow, bind, plan};
use crate::session::members::Moment;

impl Session {
    /// Looks at members and lanes and does what is due; returns when to look again.
    pub(super) async fn look(&mut self, process: &Process) -> Result<Instant, Lost> {
        let ids: Vec<SubscriptionId> = self.services.iter().map(|service| service.id).collect();
        let topics: Vec<&str> = match self.looks % HEADS_EVERY {
            0 => process.logs.keys().map(AsRef::as_ref).collect(),
            _ => Vec::new(),
        };
        self.looks = self.looks.wrapping_add(1);
        let query = sqlx::query_scalar(LOOK)
            .bind(ids)
            .bind(topics)
            .fetch_one(&mut self.listener);
        let asked = Instant::now();
        let sqlx::types::Json(look): sqlx::types::Json<Look> = in_time(&self.lease, query).await?;
        let moment = Moment {
            asked,
            told: Instant::now(),
        };
        self.mind_clocks(&look, moment).await?;
        if let Some(moved) = process.clock.learn(look.now) {
            self.advance(process, moved);
        }
        for (topic, head) in &look.heads {
            if let Some(log) = process.logs.get(topic.as_str()) {
                log.set_head(*head);
            }
        }
        if !look.members.iter().any(|member| member.id == self.id) {
            return Err(Lost::from("this instance's registration is gone".to_owned()));
        }
        let (dead, mut again) = self.find_dead(&look, moment);
        let takes = self.who_takes_what(&look, &dead).await?;
        for n in 0..self.services.len() {
            let takes = takes.get(&self.services[n].id);
            self.arrange(n, &look, &dead, takes).await?;
            if let Some(takes) = takes
                && self.serve_needs(n, &look, takes).await?
            {
                again = again.min(Instant::now() + LOOK_SOON);
            }
        }
        for service in &mut self.services {
            service.keep_pace(&look);
        }
        for service in self.services.iter().filter(|s| look.decided.contains(&s.id)) {
            let lanes: Vec<Lane> = service.claims.lanes().collect();
            let held = in_time(
                &self.lease,
                redelivery::of_operators(&mut self.listener, service.id, &service.plan.filters, &lanes),
            )
            .await?;
            if held.len() as i64 == redelivery::DECIDED {
                // There are more.
                again = again.min(Instant::now() + LOOK_SOON);
            }
            service.command(Command::Decided(held));
        }
        Ok(again)
    }

    /// Which owners of lanes are dead: they have not been heard of for their lease, their lock has been missing for the grace, or they are no longer
    /// registered.
    pub(super) fn find_dead(&mut self, look: &Look, moment: Moment) -> (HashSet<ConsumerId>, Instant) {
        let (mut dead, next) = self.members.dead(&look.members, self.id, moment);
        let registered: HashSet<ConsumerId> = look.members.iter().map(|member| member.id).collect();
        dead.extend(
            look.lanes
                .iter()
                .filter_map(|lane| lane.3)
                .filter(|owner| !registered.contains(owner)),
        );
        dead.extend(self.former.iter().filter(|id| **id != self.id));
        let again = moment.told + LOOK_EVERY;
        (dead, next.map_or(again, |next| again.min(next)))
    }

    /// Claims, releases and revokes lanes of one subscription.
    pub(super) async fn arrange(
        &mut self,
        n: usize,
        look: &Look,
        dead: &HashSet<ConsumerId>,
        takes: Option<&HashMap<ConsumerId, Takes>>,
    ) -> Result<(), Lost> {
        let me = self.id;
        let service = &mut self.services[n];
        let members: Vec<ConsumerId> = look
            .members
            .iter()
            .filter(|member| !dead.contains(&member.id) && !member.leaving)
            .filter(|member| member.subscriptions.contains(&service.id))
            .map(|member| member.id)
            .collect();
        let mut rows: Vec<LaneRow> = look
            .lanes
            .iter()
            .filter(|lane| lane.0 == service.id)
            .map(LaneOf::row)
            .collect();
        let lost = service.claims.lose(me, &rows);
        if !lost.is_empty() {
            warn!(subscription = %service.id, lanes = ?lost, "lanes have another owner now");
            service.command(Command::Revoke(lost));
        }
        // A lane that was claimed without the answer arriving, or that an operator moved, is claimed again. More than the share, too: nobody
        // else may have it, and what is too much is released in order.
        let mut strays = Vec::new();
        for row in rows
            .iter_mut()
            .filter(|row| row.owner == Some(me) && !service.claims.holds(row.lane))
        {
            row.owner = None;
            strays.push(row.clone());
        }
        let bound = takes.map(|takes| bind(&rows, takes)).unwrap_or_default();
        let mut plan = plan(me, &members, dead, &rows, &bound);
        strays.retain(|stray| !plan.claim.contains(stray));
        plan.claim.extend(strays);
        if !plan.release.is_empty() {
            service.command(Command::Release(plan.release));
        }
        let rests = service.rests_until.is_some_and(|until| Instant::now() < until);
        if plan.claim.is_empty() || rests {
            return Ok(());
        }
        let lanes: Vec<Lane> = plan.claim.iter().map(|row| row.lane).collect();
        let epochs: Vec<Epoch> = plan.claim.iter().map(|row| row.epoch).collect();
        // This process's own earlier sessions lost their connection, not their life.
        let died: Vec<bool> = plan
            .claim
            .iter()
            .map(|row| row.owner.is_some_and(|owner| !self.former.contains(&owner)))
            .collect();
        let query = sqlx::query_as(
            "SELECT lane, epoch, position, pending, done, crashes, needs FROM postbox.claim($1, $2, $3, $4, $5)",
        )
        .bind(me)
        .bind(service.id)
        .bind(lanes)
        .bind(epochs)
        .bind(died)
        .fetch_all(&mut self.listener);
        let claimed: Vec<ClaimedRow> = in_time(&self.lease, query).await?;
        if claimed.is_empty() {
            return Ok(());
        }
        info!(
            consumer = %me,
            subscription = %service.id,
            lanes = claimed.len(),
            of = service.lanes,
            "claimed lanes"
        );
        let numbers: Vec<Lane> = claimed.iter().map(|(lane, ..)| *lane).collect();
        let lanes = claimed
            .into_iter()
            .map(|(lane, epoch, cut, pending, done, crashes, needs)| {
                service.claims.add(lane, epoch);
                let lane_state = OwnedLane {
                    pending: pending.into_iter().filter(|offset| *offset < cut).collect(),
                    done: done.into_iter().collect(),
                    crashes,
                    needs,
                    ..OwnedLane::new(epoch, cut)
                };
                (lane, lane_state)
            })
            .collect();
        // Only the owner writes them, so they are as they will be when the executor gets them.
        let held = in_time(
            &self.lease,
            redelivery::of_lanes(
                &mut self.listener,
                service.id,
                &service.plan.filters,
                &numbers,
                service.plan.order.as_str(),
            ),
        )
        .await?;
        let parked = in_time(
            &self.lease,
            redelivery::parked_keys(&mut self.listener, service.id, &numbers),
        )
        .await?;
        service.command(Command::Claimed(Claim {
            lanes,
            held,
            parked,
            anchor: None,
        }));
        Ok(())
    }
}
