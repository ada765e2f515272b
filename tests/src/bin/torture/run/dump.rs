//! What is left to look at when a run was not clean.

use super::*;

impl TortureRun {
    /// What the database says, beside the logs of a run that failed.
    pub(super) async fn dump(&self) {
        for (name, query) in DUMPS {
            let rows: Result<Vec<String>, sqlx::Error> =
                sqlx::query_scalar(query).fetch_all(&self.pool).await;
            let text = rows.map_or_else(|error| error.to_string(), |rows| rows.join("\n"));
            if let Err(error) = write_dump(&self.folder, name, &text) {
                eprintln!("warning: {error:#}");
            }
        }
    }
}

fn write_dump(folder: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let path = folder.join(format!("{name}.table"));
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

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
