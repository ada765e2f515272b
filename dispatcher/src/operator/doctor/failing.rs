//! Subscriptions that stand still because everything fails, or because others have the connections.

use super::{Finding, Severity, span};
use crate::status::{BreakerState, SubscriptionStatus};

pub(super) fn failing(subscription: &SubscriptionStatus) -> Vec<Finding> {
    let SubscriptionStatus {
        group_name,
        topic,
        backlog,
        retrying,
        ..
    } = subscription;
    let mut findings = Vec::new();
    match subscription.breaker {
        Some(BreakerState::Open) => findings.push(Finding::new(
            Severity::Warning,
            "breaker-open",
            format!("everything fails for {group_name} on {topic}: {retrying} messages are retried, and {backlog} wait"),
            "see the errors in its log or in postbox.redelivery; once one message succeeds it goes on by itself",
        )),
        Some(BreakerState::Full) => findings.push(Finding::new(
            Severity::Warning,
            "failing-full",
            format!("{retrying} messages of {group_name} on {topic} fail, as many as may, so {backlog} others wait"),
            "see the errors in its log or in postbox.redelivery; or raise Consumer::max_failing",
        )),
        _ => {}
    }
    if let Some(seconds) = subscription.connection_wait {
        findings.push(Finding::new(
            Severity::Warning,
            "no-connection",
            format!("a message of {group_name} on {topic} has waited {} for a connection of its instance's pool", span(seconds)),
            "the instance's log says who has them: give the pool more, a group fewer (connections = n), or handlers a pool of their own (Consumer::tx_pool)",
        ));
    }
    findings
}
