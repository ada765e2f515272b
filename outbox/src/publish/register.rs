//! What is sent to register a recurring message.

use super::query::{Answer, Bind, Query, instant, interval};
use crate::cron::register::{FIRED, ValidCron, next};
use crate::error::Result;
use crate::outgoing::When;

impl ValidCron {
    /// Asks what of it has fired.
    pub(crate) fn fired(&self) -> Query {
        Query::new(FIRED, vec![Bind::text(self.name.as_str())])
    }

    /// Registers it, that known.
    pub(crate) fn register(&self, fired: &Answer) -> Result<Query> {
        let message = &self.message;
        let next = next(&fired.0, &self.schedule)?;
        let parameters = vec![
            Bind::text(self.name.as_str()),
            Bind::text(self.schedule.expression()),
            Bind::text(self.schedule.time_zone()),
            Bind::text(self.missed.as_str()),
            Bind::text(message.topic.as_ref()),
            Bind::maybe(message.message_type.as_deref()),
            Bind::maybe(message.key.as_deref()),
            Bind::Text(message.headers.as_ref().map(ToString::to_string)),
            Bind::maybe(message.content_type.as_deref()),
            Bind::Bytes(message.payload.clone()),
            Bind::Text(message.expiry.and_then(When::span).map(interval)),
            Bind::Text(next.map(instant)),
        ];
        Ok(Query::new(REGISTER, parameters))
    }
}

/// What is the same is not written, so that a restart of many consumers is none of many updates.
const REGISTER: &str = "WITH given AS ( \
         INSERT INTO postbox.cron AS c (name, schedule, time_zone, missed, topic, type, key, headers, content_type, payload, \
             expires_in, next_at) \
         VALUES ($1::text, $2::text, $3::text, $4::text, $5::text, $6::text, $7::text, $8::text::jsonb, $9::text, $10::bytea, \
             $11::text::interval, $12::text::timestamptz) \
         ON CONFLICT (name) DO UPDATE \
         SET schedule = excluded.schedule, time_zone = excluded.time_zone, missed = excluded.missed, topic = excluded.topic, \
             type = excluded.type, key = excluded.key, headers = excluded.headers, content_type = excluded.content_type, \
             payload = excluded.payload, expires_in = excluded.expires_in, \
             next_at = CASE WHEN (c.schedule, c.time_zone) = (excluded.schedule, excluded.time_zone) THEN c.next_at \
                 ELSE excluded.next_at END, \
             computed_at = CASE WHEN (c.schedule, c.time_zone) = (excluded.schedule, excluded.time_zone) THEN c.computed_at \
                 ELSE excluded.computed_at END \
         WHERE (c.schedule, c.time_zone, c.missed, c.topic, c.type, c.key, c.headers, c.content_type, c.payload, c.expires_in) \
             IS DISTINCT FROM (excluded.schedule, excluded.time_zone, excluded.missed, excluded.topic, excluded.type, excluded.key, \
                 excluded.headers, excluded.content_type, excluded.payload, excluded.expires_in) \
         RETURNING c.next_at \
     ) \
     SELECT CASE WHEN isfinite(next_at) THEN (EXTRACT(epoch FROM next_at) * 1000000)::bigint::text END AS answer \
     FROM (SELECT next_at FROM given UNION ALL SELECT c.next_at FROM postbox.cron c WHERE c.name = $1::text LIMIT 1) AS registered";
