-- Where subscriptions stand, by arithmetic on offsets.

CREATE OR REPLACE FUNCTION postbox.unsettled(of_subscription integer) RETURNS TABLE (lane smallint, "position" bigint, pending bigint[])
    LANGUAGE plpgsql STABLE
    SET jit = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH lanes AS MATERIALIZED (
        SELECT l.lane, t.position, t.pending
        FROM postbox.lane l CROSS JOIN LATERAL postbox.lane_state(l.subscription_id, l.lane) t
        WHERE l.subscription_id = of_subscription
    ),
    -- What is listed for one lane may be another one's, where it means nothing.
    listed AS MATERIALIZED (
        SELECT d."offset", postbox.lane_at(s.topic, d."offset", s.lanes) AS lane
        FROM postbox.subscription s,
            (SELECT DISTINCT p AS "offset" FROM lanes l CROSS JOIN LATERAL unnest(l.pending) p WHERE p < l.position) d
        WHERE s.id = of_subscription
    )
    SELECT l.lane, l.position,
        ARRAY(SELECT o."offset" FROM listed o
            WHERE o.lane = l.lane AND o."offset" < l.position AND o."offset" = ANY (l.pending) ORDER BY 1)
    FROM lanes l;
END $$;
COMMENT ON FUNCTION postbox.unsettled IS
    'What each lane of a subscription has not settled: all its offsets from position on, and those in pending, which are its own and retained.';

CREATE OR REPLACE FUNCTION postbox.settled_below(of_subscription integer) RETURNS bigint
    LANGUAGE sql STABLE AS $$
    SELECT least(
        (SELECT min(least(u.position, u.pending[1])) FROM postbox.unsettled(of_subscription) u),
        (SELECT min(p."offset") FROM postbox.parked_key p WHERE p.subscription_id = of_subscription))
$$;
COMMENT ON FUNCTION postbox.settled_below IS 'The least offset that a subscription has not settled: below it everything is.';

CREATE OR REPLACE FUNCTION postbox.backlog(
    of_subscription integer,
    OUT "position" bigint, OUT next_offset bigint, OUT messages bigint, OUT exact boolean, OUT oldest_at timestamptz
)
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    s         postbox.subscription;
    oldest    postbox.segment;
    positions bigint[];
    lowest    bigint;
    highest   bigint;
    pending   bigint;
    behind    bigint := 0;
BEGIN
    SELECT * INTO s FROM postbox.subscription WHERE id = of_subscription;
    -- Before the positions: what is sequenced in between is not counted.
    next_offset := postbox.next_offset(s.topic);
    SELECT array_agg(least(u.position, next_offset) ORDER BY u.lane), min(u.position), max(u.position),
        coalesce(sum(cardinality(u.pending)), 0), min(least(u.position, u.pending[1]))
    INTO positions, lowest, highest, pending, position
    FROM postbox.unsettled(of_subscription) u;
    lowest := least(lowest, next_offset);
    highest := least(highest, next_offset);
    position := least(position, next_offset);
    exact := highest - lowest <= 65536;
    IF lowest = highest THEN
        NULL;
    ELSIF exact THEN
        -- Between the lanes' positions it depends on each message's lane.
        SELECT count(*) INTO behind
        FROM postbox.segment g
        CROSS JOIN LATERAL unnest(g.seqs, g.keys) WITH ORDINALITY AS e (seq, key, n)
        WHERE g.topic = s.topic AND g.base >= lowest - 1024 AND g.base + g.count > lowest AND g.base < highest
            AND g.base + e.n - 1 BETWEEN lowest AND highest - 1
            AND g.base + e.n - 1 >= positions[postbox.lane_of(g.base + e.n - 1, e.key, s.lanes) + 1];
    ELSE
        -- As if the keys were spread evenly.
        SELECT sum(highest - p) / s.lanes INTO behind FROM unnest(positions) p;
    END IF;
    messages := next_offset - highest + behind + pending;
    IF messages > 0 THEN
        oldest := postbox.segment_at(s.topic, position);
        SELECT o.published_at INTO oldest_at FROM postbox.outbox o
        WHERE o.slot = oldest.slot AND o.xid = oldest.xids[position - oldest.base + 1]
            AND o.seq = oldest.seqs[position - oldest.base + 1];
        oldest_at := coalesce(oldest_at, oldest.sequenced_at);
    END IF;
END $$;
COMMENT ON FUNCTION postbox.backlog IS
    'How many messages a subscription has not settled, without those in redelivery and those that are parked, and when the oldest was published. From offsets alone, so it costs the same for ten and ten million; exact unless its lanes are more than 65,536 offsets apart.';

CREATE OR REPLACE FUNCTION postbox.parked(of_subscription integer) RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    span CONSTANT bigint := 65536;
    s       postbox.subscription;
    lowest  bigint;
    highest bigint;
    found   bigint;
BEGIN
    SELECT min(p."offset") INTO lowest FROM postbox.parked_key p WHERE p.subscription_id = of_subscription;
    IF lowest IS NULL THEN
        RETURN 0;
    END IF;
    SELECT * INTO s FROM postbox.subscription WHERE id = of_subscription;
    SELECT max(t.position) INTO highest
    FROM (SELECT DISTINCT p.lane FROM postbox.parked_key p WHERE p.subscription_id = of_subscription) l
    CROSS JOIN LATERAL postbox.lane_state(of_subscription, l.lane) t;
    SELECT count(*) INTO found
    FROM postbox.segment g
    CROSS JOIN LATERAL unnest(g.keys) WITH ORDINALITY AS e (key, n)
    JOIN postbox.parked_key p ON p.subscription_id = of_subscription AND p.key_hash = e.key AND p."offset" < g.base + e.n
    WHERE g.topic = s.topic AND g.base >= lowest - 1024 AND g.base < least(highest, lowest + span)
        AND g.base + e.n - 1 < least(highest, lowest + span);
    -- As if they came as often all the way.
    RETURN CASE WHEN highest - lowest > span THEN found * (highest - lowest) / span ELSE found END;
END $$;
COMMENT ON FUNCTION postbox.parked IS
    'How many messages of a subscription are parked in the log; estimated from the first 65,536 offsets where it is about more of them.';

CREATE OR REPLACE FUNCTION postbox.held_back(
    of_subscription integer, OUT messages bigint, OUT bytes bigint, OUT since timestamptz
)
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    s       postbox.subscription;
    lowest  bigint := postbox.settled_below(of_subscription);
    horizon timestamptz := postbox.clock() - (SELECT r.keep FROM postbox.retention r);
BEGIN
    SELECT * INTO s FROM postbox.subscription WHERE id = of_subscription;
    SELECT coalesce(sum(g.base + g.count - greatest(g.base, lowest)), 0), coalesce(sum(g.bytes), 0), min(g.sequenced_at)
    INTO messages, bytes, since
    FROM postbox.segment g WHERE g.topic = s.topic AND g.base + g.count > lowest AND g.sequenced_at <= horizon;
END $$;
COMMENT ON FUNCTION postbox.held_back IS
    'What is older than messages are kept and stays because a subscription has not settled it: how many messages, how many bytes of payload, since when.';

CREATE OR REPLACE FUNCTION postbox.unsequenced(at_most bigint DEFAULT 1000000, OUT last_tick bigint, OUT messages bigint, OUT oldest_at timestamptz)
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    look    pg_snapshot;
    seen_to xid8;
    running xid8[];
BEGIN
    SELECT t.id, t.snapshot INTO last_tick, look FROM postbox.tick t ORDER BY t.id DESC LIMIT 1;
    seen_to := coalesce(pg_snapshot_xmax(look), '0');
    running := ARRAY(SELECT pg_snapshot_xip(look));
    SELECT count(*), min(u.published_at) INTO messages, oldest_at
    FROM (
        SELECT o.published_at FROM postbox.outbox o WHERE o.xid >= seen_to
        UNION ALL
        SELECT o.published_at FROM postbox.outbox o WHERE o.xid = ANY (running)
        LIMIT at_most) u;
END $$;
COMMENT ON FUNCTION postbox.unsequenced IS
    'How many committed messages no step of the sequencer has seen yet, up to so many, when the oldest was published, and the number of the last step.';
