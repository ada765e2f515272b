-- Seek and replay.

CREATE OR REPLACE FUNCTION postbox.seek(
    of_subscription integer, start text, value text DEFAULT NULL, original_payloads boolean DEFAULT false
) RETURNS bigint
    LANGUAGE plpgsql
    SET jit = off AS $$
#variable_conflict use_column
DECLARE
    s      postbox.subscription;
    target bigint;
    edits  bigint;
BEGIN
    PERFORM postbox.require_read_committed('postbox.seek()');
    -- A truncation in progress has this table in SHARE mode: what it truncates is gone before the target is looked up, or it sees the seek.
    UPDATE postbox.subscription SET last_live_at = last_live_at WHERE id = of_subscription RETURNING * INTO s;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no subscription %', of_subscription USING ERRCODE = 'PB004';
    END IF;
    target := postbox.start_offset(s.topic, start, value);
    IF target IS NULL THEN
        RAISE EXCEPTION 'a position is earliest, latest, offset, time or ago, not %', start USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- What is delivered from the log is as it was published.
    SELECT count(*) INTO edits FROM postbox.edit e WHERE e.subscription_id = of_subscription AND e."offset" >= target;
    IF edits > 0 AND NOT original_payloads THEN
        RAISE EXCEPTION '% messages from offset % on were redriven with another payload, and would come as they were published', edits, target
            USING ERRCODE = 'PB007', HINT = 'postbox.replay() gives the payloads that they were redriven with; say original_payloads => true if it is to be the old ones.';
    END IF;
    DELETE FROM postbox.edit e WHERE e.subscription_id = of_subscription AND e."offset" >= target;
    -- Settlements below a lane's position that are not pending mean nothing to anybody, so most are deleted while handlers still run.
    DELETE FROM postbox.settlement t
    USING postbox.lane l CROSS JOIN LATERAL postbox.lane_state(l.subscription_id, l.lane) n
    WHERE l.subscription_id = of_subscription AND t.subscription_id = of_subscription AND t.lane = l.lane
        AND t."offset" >= target AND t."offset" < n.position AND t."offset" <> ALL (n.pending);

    -- The fence of every lane: what transactional handlers commit is before this, or refused.
    PERFORM pg_advisory_xact_lock(1347571762, of_subscription * 1024 + n) FROM generate_series(0, s.lanes - 1) n;
    PERFORM FROM postbox.lane l WHERE l.subscription_id = of_subscription ORDER BY l.lane FOR UPDATE;
    DELETE FROM postbox.settlement t WHERE t.subscription_id = of_subscription AND t."offset" >= target;
    -- They come again from the log. Those before the target stay: they were passed, and still wait for their turn.
    PERFORM postbox.copy_parked(of_subscription, p.lane, target, NULL)
    FROM (SELECT DISTINCT p.lane FROM postbox.parked_key p WHERE p.subscription_id = of_subscription) p;
    DELETE FROM postbox.parked_key p WHERE p.subscription_id = of_subscription;
    DELETE FROM postbox.redelivery r WHERE r.subscription_id = of_subscription AND r."offset" >= target;
    UPDATE postbox.dead_letter d SET halted = false WHERE d.subscription_id = of_subscription AND d."offset" >= target AND d.halted;
    -- The owner stays, so that nobody else claims a lane whose handlers still run there: it finds its epoch stale at its next look, stops
    -- them and claims anew.
    UPDATE postbox.lane l SET epoch = l.epoch + 1, position = target, pending = '{}', crashes = 0, changed_at = clock_timestamp()
    WHERE l.subscription_id = of_subscription;
    -- What comes again meets the filters that there are now.
    UPDATE postbox.filter f SET "offset" = target WHERE f.subscription_id = of_subscription AND f."offset" > target
        AND f.n = (SELECT max(o.n) FROM postbox.filter o WHERE o.subscription_id = of_subscription);
    -- Without a word it makes every session look at once.
    PERFORM pg_notify('postbox_segment', '');
    RETURN target;
END $$;
COMMENT ON FUNCTION postbox.seek IS
    'Moves a subscription to a start position (as postbox.start_offset); from there on every message is delivered, again or for the first time. Failed messages before it stay, those after it come again from the log. Running consumers follow at once. Messages that were redriven with another payload come as they were published, which must be asked for (original_payloads). Returns the offset.';

CREATE OR REPLACE FUNCTION postbox.replay(of_subscription integer, from_offset bigint, to_offset bigint, at_most integer DEFAULT 1000,
    OUT next_offset bigint, OUT replayed bigint
)
    LANGUAGE plpgsql
    SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    s     postbox.subscription;
    last  bigint;
    first bigint;
    copied_lanes   smallint[];
    copied_offsets bigint[];
BEGIN
    -- As in postbox.seek: what is being truncated is not read.
    UPDATE postbox.subscription SET last_live_at = last_live_at WHERE id = of_subscription RETURNING * INTO s;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no subscription %', of_subscription USING ERRCODE = 'PB004';
    END IF;
    first := greatest(from_offset, postbox.first_offset(s.topic));
    -- What is not settled is delivered anyway, by the log or by redelivery.
    last := least(to_offset, postbox.settled_below(of_subscription), first + at_most);
    next_offset := greatest(first, last);
    WITH entries AS (
        SELECT g.slot, g.base + e.n - 1 AS "offset", e.xid, e.seq, e.key_hash
        FROM postbox.segment g CROSS JOIN LATERAL unnest(g.xids, g.seqs, g.keys) WITH ORDINALITY AS e (xid, seq, key_hash, n)
        WHERE g.topic = s.topic AND g.base >= first - 1024 AND g.base + g.count > first AND g.base < last
            AND g.base + e.n - 1 BETWEEN first AND last - 1
    ),
    copied AS (
        INSERT INTO postbox.redelivery (subscription_id, "offset", lane, state, attempt, due_at, seq, id, published_at, type, key, key_hash,
            headers, content_type, payload)
        SELECT of_subscription, e."offset", postbox.lane_of(e."offset", e.key_hash, s.lanes), 'redriven', 0, postbox.clock(), o.seq, o.id,
            o.published_at, o.type, o.key, e.key_hash, coalesce(o.headers, '{}') || '{"postbox-replayed": "1"}', o.content_type,
            coalesce((SELECT d.payload FROM postbox.edit d WHERE d.subscription_id = of_subscription AND d."offset" = e."offset"), o.payload)
        FROM entries e CROSS JOIN LATERAL (
            SELECT * FROM postbox.outbox o WHERE o.slot = e.slot AND o.xid = e.xid AND o.seq = e.seq OFFSET 0) o
        ORDER BY e."offset"
        -- One that failed is still on its way.
        ON CONFLICT (subscription_id, "offset") DO NOTHING
        RETURNING lane, "offset"
    )
    SELECT count(*), array_agg(c.lane), array_agg(c."offset") INTO replayed, copied_lanes, copied_offsets FROM copied c;
    -- A claim takes a message that has a settlement for done, whatever became of its row.
    DELETE FROM postbox.settlement t USING unnest(copied_lanes, copied_offsets) AS c (lane, "offset")
    WHERE t.subscription_id = of_subscription AND t.lane = c.lane AND t."offset" = c."offset";
    PERFORM pg_notify('postbox_segment', '');
END $$;
COMMENT ON FUNCTION postbox.replay IS
    'Has settled messages of a range of offsets run again, at most so many, without moving the subscription: they go to redelivery with a header postbox-replayed, and with the payload that they were redriven with if it was another one. Returns where to go on, and how many.';
