-- Retention, replay, pause and limits: how the ring turns, and what an operator may do to a subscription. See ARCHITECTURE.md, "Retention".

CREATE TABLE postbox.retention (
    one                    boolean     PRIMARY KEY DEFAULT true CHECK (one),
    keep                   interval    NOT NULL DEFAULT '3 days',
    expire_abandoned_after interval    CHECK (expire_abandoned_after > '0'),
    watched_at             timestamptz NOT NULL DEFAULT postbox.clock()
);
COMMENT ON TABLE postbox.retention IS 'The one row says how long messages are kept. Written by operators, and by the dispatcher that watches.';
COMMENT ON COLUMN postbox.retention.one IS 'There is one row.';
COMMENT ON COLUMN postbox.retention.keep IS 'For how long a message is kept at least, whoever has consumed it. Change it with postbox.set_retention().';
COMMENT ON COLUMN postbox.retention.expire_abandoned_after IS
    'A subscription without a live consumer for so long is dropped with its failed messages; null: never.';
COMMENT ON COLUMN postbox.retention.watched_at IS 'When a dispatcher last looked which subscriptions have a live consumer.';
INSERT INTO postbox.retention DEFAULT VALUES;

CREATE FUNCTION postbox.set_retention(new_keep interval) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    seconds bigint := ceil(extract(epoch FROM new_keep) / 6);
BEGIN
    IF new_keep IS NULL OR new_keep < '1 minute' OR seconds > 52704000 THEN
        RAISE EXCEPTION 'messages cannot be kept for %: it is one minute to ten years', new_keep USING ERRCODE = 'invalid_parameter_value';
    END IF;
    UPDATE postbox.retention SET keep = new_keep WHERE keep <> new_keep;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- Six slots are kept, one is being filled, one is being truncated. Which slot holds what is decided by what is in it, so the
    -- length of a slot may change at any time.
    EXECUTE format('CREATE OR REPLACE FUNCTION postbox.slot_of(at timestamptz) RETURNS smallint LANGUAGE sql STABLE PARALLEL SAFE
        RETURN ((date_part(''epoch'', at)::bigint / %s) %% 8)::smallint', seconds);
    EXECUTE format('COMMENT ON FUNCTION postbox.slot_of IS %L', format(
        'The ring slot of an instant: eight slots of %s, a sixth of what is kept.', make_interval(secs => seconds)));
END $$;
COMMENT ON FUNCTION postbox.set_retention IS 'How long messages are kept at least, one minute to ten years; the slots become a sixth of it. Needs the owner of the schema.';

ALTER TABLE postbox.topic ADD COLUMN first_offset bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN postbox.topic.first_offset IS 'Some offsets below it were truncated; from it on all are there. Written when a slot is truncated.';

ALTER TABLE postbox.lane ADD COLUMN checkpoint_id bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN postbox.lane.checkpoint_id IS
    'Checkpoints up to this one are in position and pending: an older one whose slot is still there says nothing. Written when checkpoints are truncated.';

ALTER TABLE postbox.subscription
    ADD COLUMN paused boolean NOT NULL DEFAULT false,
    ADD COLUMN rate_limit double precision CHECK (rate_limit > 0),
    ADD COLUMN instance_rate_limit double precision CHECK (instance_rate_limit > 0),
    ADD COLUMN drain_window text,
    ADD COLUMN rate_limit_in_code double precision CHECK (rate_limit_in_code > 0),
    ADD COLUMN instance_rate_limit_in_code double precision CHECK (instance_rate_limit_in_code > 0),
    ADD COLUMN drain_window_in_code text,
    ADD COLUMN last_live_at timestamptz NOT NULL DEFAULT postbox.clock();
COMMENT ON COLUMN postbox.subscription.paused IS 'Whether no message is started.';
COMMENT ON COLUMN postbox.subscription.rate_limit IS
    'Most messages started a second by all instances together, as an operator says; infinity: no limit; null: as the code says.';
COMMENT ON COLUMN postbox.subscription.instance_rate_limit IS 'The same for each instance.';
COMMENT ON COLUMN postbox.subscription.drain_window IS
    'When messages are started, by the wall clock of a time zone, such as 22:00-06:00 Europe/Berlin, as an operator says; always: no window; null: as the code says.';
COMMENT ON COLUMN postbox.subscription.rate_limit_in_code IS
    'What the handlers of the instance that started last say, and what holds where an operator says nothing; null: no limit.';
COMMENT ON COLUMN postbox.subscription.instance_rate_limit_in_code IS 'The same for each instance.';
COMMENT ON COLUMN postbox.subscription.drain_window_in_code IS 'The same of the window; null: always.';
COMMENT ON COLUMN postbox.subscription.last_live_at IS 'When a dispatcher last saw a live consumer of it, to the hour.';

CREATE FUNCTION postbox.pace_in_code(of_subscription integer, rate double precision, instance_rate double precision, daily_window text)
    RETURNS void
    LANGUAGE sql VOLATILE AS $$
    UPDATE postbox.subscription s
    SET rate_limit_in_code = rate, instance_rate_limit_in_code = instance_rate, drain_window_in_code = daily_window
    WHERE s.id = of_subscription AND (s.rate_limit_in_code, s.instance_rate_limit_in_code, s.drain_window_in_code)
        IS DISTINCT FROM (rate, instance_rate, daily_window)
$$;
COMMENT ON FUNCTION postbox.pace_in_code IS 'Notes the limits and the window that a subscription''s handlers have in code.';

CREATE FUNCTION postbox.pace(
    of_subscription integer, OUT paused boolean, OUT rate_limit double precision, OUT instance_rate_limit double precision, OUT drain_window text
)
    LANGUAGE sql STABLE AS $$
    SELECT s.paused, nullif(coalesce(s.rate_limit, s.rate_limit_in_code), 'infinity'),
        nullif(coalesce(s.instance_rate_limit, s.instance_rate_limit_in_code), 'infinity'),
        nullif(coalesce(s.drain_window, s.drain_window_in_code), 'always')
    FROM postbox.subscription s WHERE s.id = of_subscription
$$;
COMMENT ON FUNCTION postbox.pace IS 'What holds for a subscription: what an operator says, else what the code says; null: no limit, no window.';

---------------------------------------------------------------------------------------------------------------- what is retained

CREATE OR REPLACE FUNCTION postbox.first_offset(of_topic text) RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    result bigint;
    floor  bigint;
BEGIN
    SELECT t.first_offset INTO floor FROM postbox.topic t WHERE t.name = of_topic;
    SELECT s.base INTO result FROM postbox.segment s WHERE s.topic = of_topic ORDER BY s.base LIMIT 1;
    -- A slot that somebody holds back may be older than one that was truncated: then there is a gap below the floor.
    RETURN greatest(coalesce(result, postbox.next_offset(of_topic)), floor);
END $$;
COMMENT ON FUNCTION postbox.first_offset IS 'The earliest retained offset of a topic: from it on every message is there.';

CREATE OR REPLACE FUNCTION postbox.start_offset(of_topic text, start text, value text) RETURNS bigint
    LANGUAGE sql STABLE AS $$
    SELECT CASE start
        WHEN 'earliest' THEN postbox.first_offset(of_topic)
        WHEN 'latest' THEN postbox.next_offset(of_topic)
        WHEN 'offset' THEN least(greatest(value::bigint, postbox.first_offset(of_topic)), postbox.next_offset(of_topic))
        WHEN 'time' THEN greatest(postbox.offset_at(of_topic, value::timestamptz), postbox.first_offset(of_topic))
        WHEN 'ago' THEN greatest(postbox.offset_at(of_topic, postbox.clock() - value::interval), postbox.first_offset(of_topic))
    END
$$;

---------------------------------------------------------------------------------------------------------- where subscriptions stand

CREATE FUNCTION postbox.lane_of(at bigint, key_hash integer, lanes integer) RETURNS smallint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (coalesce(key_hash, at) % lanes)::smallint;
COMMENT ON FUNCTION postbox.lane_of IS 'The lane of a message: by the hash of its key, or by its offset if it has none.';

CREATE FUNCTION postbox.segment_at(of_topic text, at bigint) RETURNS postbox.segment
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    result postbox.segment;
BEGIN
    SELECT s.* INTO result FROM postbox.segment s WHERE s.topic = of_topic AND s.base <= at ORDER BY s.base DESC LIMIT 1;
    IF at < result.base + result.count THEN
        RETURN result;
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION postbox.segment_at IS 'The segment that holds an offset; null if there is none.';

CREATE FUNCTION postbox.lane_at(of_topic text, at bigint, lanes integer) RETURNS smallint
    LANGUAGE plpgsql STABLE AS $$
DECLARE
    s postbox.segment := postbox.segment_at(of_topic, at);
BEGIN
    IF s.base IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN postbox.lane_of(at, s.keys[at - s.base + 1], lanes);
END $$;
COMMENT ON FUNCTION postbox.lane_at IS 'The lane of the message at an offset; null if it is not retained.';

CREATE FUNCTION postbox.lane_state(of_subscription integer, of_lane smallint) RETURNS TABLE (
    consumer_id integer, epoch integer, "position" bigint, pending bigint[]
)
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    l postbox.lane;
    c postbox.checkpoint;
    n integer;
BEGIN
    SELECT * INTO l FROM postbox.lane WHERE subscription_id = of_subscription AND lane = of_lane;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- The owner's newest checkpoint counts if it was written under this ownership; a consumer writes one row for all its lanes.
    SELECT * INTO c FROM postbox.checkpoint
    WHERE subscription_id = of_subscription AND consumer_id = l.consumer_id AND id > l.checkpoint_id ORDER BY id DESC LIMIT 1;
    n := array_position(c.lanes, of_lane);
    IF n IS NOT NULL AND c.epochs[n] = l.epoch THEN
        l.position := c.positions[n];
        l.pending := CASE WHEN c.pending_lanes IS NULL THEN c.pending
            ELSE ARRAY(SELECT p."offset" FROM unnest(c.pending, c.pending_lanes) AS p ("offset", lane) WHERE p.lane = of_lane) END;
    END IF;
    RETURN QUERY SELECT l.consumer_id, l.epoch, l.position, l.pending;
END $$;
COMMENT ON FUNCTION postbox.lane_state IS 'Where a lane stands: its baseline, or its owner''s newest checkpoint.';

CREATE FUNCTION postbox.unsettled(of_subscription integer) RETURNS TABLE (lane smallint, "position" bigint, pending bigint[])
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

CREATE FUNCTION postbox.settled_below(of_subscription integer) RETURNS bigint
    LANGUAGE sql STABLE AS $$
    SELECT least(
        (SELECT min(least(u.position, u.pending[1])) FROM postbox.unsettled(of_subscription) u),
        (SELECT min(p."offset") FROM postbox.parked_key p WHERE p.subscription_id = of_subscription))
$$;
COMMENT ON FUNCTION postbox.settled_below IS 'The least offset that a subscription has not settled: below it everything is.';

CREATE FUNCTION postbox.backlog(
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

CREATE FUNCTION postbox.parked(of_subscription integer) RETURNS bigint
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

--------------------------------------------------------------------------------------------------------------- turning the ring

CREATE FUNCTION postbox.slot_in_use(of_slot smallint) RETURNS boolean
    LANGUAGE sql VOLATILE
    RETURN (SELECT of_slot IN (postbox.slot_of(n.now), postbox.slot_of(n.now - n.margin), postbox.slot_of(n.now + n.margin))
        FROM (SELECT postbox.clock() AS now, r.keep / 72 AS margin FROM postbox.retention r) n);
COMMENT ON FUNCTION postbox.slot_in_use IS 'Whether a slot is the current one, or was or will be within a twelfth of a slot.';

CREATE FUNCTION postbox.slot_held_by(tables regclass[]) RETURNS text
    LANGUAGE sql VOLATILE AS $$
    SELECT string_agg(DISTINCT CASE WHEN l.pid IS NULL THEN 'a prepared transaction' ELSE format('process %s', l.pid) END, ', ')
    FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'relation' AND l.relation = ANY (tables) AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
        AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
        AND (l.pid IS NULL OR l.mode = 'RowExclusiveLock' OR a.xact_start < clock_timestamp() - interval '1 second')
$$;
COMMENT ON FUNCTION postbox.slot_held_by IS
    'Whose transaction has written to one of these tables or has read it for longer than a second: queueing behind it would only make others wait.';

CREATE FUNCTION postbox.begin_truncation() RETURNS boolean
    LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'a slot must be truncated in READ COMMITTED, not %', current_setting('transaction_isolation')
            USING HINT = 'What is checked must be newer than the locks.';
    END IF;
    RETURN pg_try_advisory_xact_lock(1347571761, 7);
END $$;
COMMENT ON FUNCTION postbox.begin_truncation IS 'Whether nobody else is truncating.';

-- The lock timeout bounds for how long others wait behind a truncation that cannot have its lock; then it fails (55P03) and is tried again later.
CREATE FUNCTION postbox.truncate_log(of_slot smallint, OUT outcome text, OUT messages bigint, OUT bytes bigint, OUT detail text)
    LANGUAGE plpgsql
    SET lock_timeout = '25ms' SET jit = off AS $$
#variable_conflict use_column
DECLARE
    keep    interval := (SELECT r.keep FROM postbox.retention r);
    outbox  text := format('postbox.outbox_%s', of_slot);
    segment text := format('postbox.segment_%s', of_slot);
    -- The last segment of each topic in the slot.
    find    text := format('SELECT array_agg(t.name ORDER BY t.name), array_agg(l.base + l.count ORDER BY t.name), max(l.sequenced_at)
        FROM postbox.topic t CROSS JOIN LATERAL (
            SELECT s.base, s.count, s.sequenced_at FROM %s s WHERE s.topic = t.name ORDER BY s.base DESC LIMIT 1) l', segment);
    topics  text[];
    ends    bigint[];
    newest  timestamptz;
    topics_now text[];
    ends_now   bigint[];
    look    pg_snapshot;
    unseen  boolean;
BEGIN
    messages := 0;
    bytes := 0;
    IF postbox.slot_in_use(of_slot) THEN
        outcome := 'in use';
        RETURN;
    END IF;
    IF NOT postbox.begin_truncation() THEN
        outcome := 'busy';
        detail := 'another dispatcher is truncating';
        RETURN;
    END IF;
    EXECUTE find INTO topics, ends, newest;
    IF topics IS NULL THEN
        outcome := 'empty';
        RETURN;
    END IF;

    -- Offsets never restart. Long before the slot is truncated, so that whoever sees its segments gone sees this too.
    UPDATE postbox.topic t SET next_offset = u.last FROM unnest(topics, ends) AS u (topic, last)
    WHERE t.name = u.topic AND t.next_offset < u.last;
    IF FOUND THEN
        outcome := 'carried';
        RETURN;
    END IF;
    IF newest > postbox.clock() - keep THEN
        outcome := 'young';
        RETURN;
    END IF;
    detail := postbox.holders(topics, ends);
    IF detail IS NOT NULL THEN
        outcome := 'held';
        RETURN;
    END IF;
    detail := postbox.slot_held_by(ARRAY[outbox::regclass, segment::regclass]);
    IF detail IS NOT NULL THEN
        outcome := 'busy';
        RETURN;
    END IF;
    EXECUTE format('SELECT sum(s.count) FROM %s s', segment) INTO messages;
    bytes := pg_total_relation_size(outbox) + pg_total_relation_size(segment);

    -- From here on no subscription is added and none goes back (postbox.seek writes this table first); positions only grow.
    LOCK TABLE postbox.subscription IN SHARE MODE;
    detail := postbox.holders(topics, ends);
    IF detail IS NOT NULL THEN
        outcome := 'held';
        RETURN;
    END IF;
    -- From here on nothing is sequenced.
    PERFORM pg_advisory_xact_lock(1347571761, 1);
    -- From here on nobody reads the slot, and there is no row in it whose transaction has not ended: it would hold its lock.
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', segment);
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', outbox);
    EXECUTE find INTO topics_now, ends_now, newest;
    IF topics_now IS DISTINCT FROM topics OR ends_now IS DISTINCT FROM ends THEN
        outcome := 'busy';
        detail := 'messages were just sequenced into the slot';
        RETURN;
    END IF;
    -- What the next step of the sequencer would find in it.
    SELECT t.snapshot INTO look FROM postbox.tick t ORDER BY t.id DESC LIMIT 1;
    EXECUTE format('SELECT EXISTS (SELECT FROM %1$s o WHERE o.xid >= $1) OR EXISTS (SELECT FROM %1$s o WHERE o.xid = ANY ($2))', outbox)
        INTO unseen USING pg_snapshot_xmax(look), ARRAY(SELECT pg_snapshot_xip(look));
    IF unseen THEN
        outcome := 'unsequenced';
        RETURN;
    END IF;
    UPDATE postbox.topic t SET first_offset = u.last FROM unnest(topics, ends) AS u (topic, last)
    WHERE t.name = u.topic AND t.first_offset < u.last;
    EXECUTE format('TRUNCATE ONLY %s, ONLY %s', segment, outbox);
    outcome := 'truncated';
END $$;
COMMENT ON FUNCTION postbox.truncate_log IS
    'Truncates a slot''s messages and segments if they are old enough and every subscription has passed them. outcome: in use, empty, carried (the topics'' offsets; it comes next), young, held (detail: by which subscriptions), unsequenced, busy (detail: by whom), truncated.';

CREATE FUNCTION postbox.copy_parked(of_subscription integer, of_lane smallint, below bigint, at_most integer) RETURNS bigint
    LANGUAGE plpgsql
    SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    s      postbox.subscription;
    state  record;
    upto   bigint;
    last   bigint;
    copied bigint;
BEGIN
    -- The owner's reports move its parked keys, and hold this shared.
    IF NOT pg_try_advisory_xact_lock(1347571762, of_subscription * 1024 + of_lane) THEN
        RETURN 0;
    END IF;
    PERFORM FROM postbox.lane l WHERE l.subscription_id = of_subscription AND l.lane = of_lane FOR UPDATE;
    SELECT * INTO state FROM postbox.lane_state(of_subscription, of_lane);
    SELECT * INTO s FROM postbox.subscription WHERE id = of_subscription;
    upto := least(below, state.position);
    WITH parked AS MATERIALIZED (
        SELECT p.key_hash, p."offset" FROM postbox.parked_key p
        WHERE p.subscription_id = of_subscription AND p.lane = of_lane AND p."offset" < upto
    ),
    entries AS MATERIALIZED (
        SELECT g.slot, g.base + e.n - 1 AS "offset", e.xid, e.seq, e.key_hash
        FROM postbox.segment g CROSS JOIN LATERAL unnest(g.xids, g.seqs, g.keys) WITH ORDINALITY AS e (xid, seq, key_hash, n)
        JOIN parked p ON p.key_hash = e.key_hash AND p."offset" < g.base + e.n
        WHERE g.topic = s.topic AND g.base >= (SELECT min(p."offset") FROM parked p) - 1024 AND g.base < upto AND g.base + e.n - 1 < upto
        ORDER BY 2 LIMIT at_most
    ),
    written AS (
        INSERT INTO postbox.redelivery (subscription_id, "offset", lane, state, attempt, due_at, seq, id, published_at, type, key, key_hash,
            headers, content_type, payload, expires_at)
        SELECT of_subscription, e."offset", of_lane, 'parked', 0, postbox.clock(), o.seq, o.id, o.published_at, o.type, o.key, e.key_hash,
            o.headers, o.content_type, o.payload, o.expires_at
        FROM entries e CROSS JOIN LATERAL (
            SELECT * FROM postbox.outbox o WHERE o.slot = e.slot AND o.xid = e.xid AND o.seq = e.seq OFFSET 0) o
    )
    SELECT count(*), max(e."offset") INTO copied, last FROM entries e;
    IF copied = at_most THEN
        upto := last + 1;
    END IF;
    UPDATE postbox.parked_key p SET "offset" = upto
    WHERE p.subscription_id = of_subscription AND p.lane = of_lane AND p."offset" < upto;
    -- As postbox.seek does it: what the owner knows of its parked keys is stale with its epoch, and it claims the lane anew.
    UPDATE postbox.lane l SET epoch = l.epoch + 1, position = state.position, pending = state.pending, changed_at = clock_timestamp()
    WHERE l.subscription_id = of_subscription AND l.lane = of_lane;
    PERFORM pg_notify('postbox_segment', '');
    RETURN copied;
END $$;
COMMENT ON FUNCTION postbox.copy_parked(integer, smallint, bigint, integer) IS
    'Copies what a lane has parked in the log below an offset to redelivery, at most so many messages, so that it outlives its slot. Returns how many.';

CREATE FUNCTION postbox.copy_parked(of_slot smallint) RETURNS text
    LANGUAGE plpgsql
    SET lock_timeout = '25ms' SET jit = off AS $$
#variable_conflict use_column
DECLARE
    keep  interval := (SELECT r.keep FROM postbox.retention r);
    room  bigint := 10000;
    late  record;
BEGIN
    IF postbox.slot_in_use(of_slot) OR NOT EXISTS (SELECT FROM postbox.parked_key) THEN
        RETURN 'nothing';
    END IF;
    FOR late IN EXECUTE format('SELECT DISTINCT p.subscription_id, p.lane, l.base + l.count AS last
        FROM postbox.topic t CROSS JOIN LATERAL (
            SELECT s.base, s.count, s.sequenced_at FROM postbox.segment_%s s WHERE s.topic = t.name ORDER BY s.base DESC LIMIT 1) l
        JOIN postbox.subscription s ON s.topic = t.name
        JOIN postbox.parked_key p ON p.subscription_id = s.id AND p."offset" < l.base + l.count
        WHERE l.sequenced_at <= postbox.clock() - $1 ORDER BY 1, 2', of_slot) USING keep
    LOOP
        -- The owners wait meanwhile. The rest is copied at the next turns.
        room := room - postbox.copy_parked(late.subscription_id, late.lane, late.last, room::integer);
        EXIT WHEN room = 0;
    END LOOP;
    RETURN 'copied';
END $$;
COMMENT ON FUNCTION postbox.copy_parked(smallint) IS
    'Copies what is parked in a slot that is old enough to be truncated, so that a key that waits for long does not hold the slot.';

CREATE FUNCTION postbox.holders(topics text[], ends bigint[]) RETURNS text
    LANGUAGE sql VOLATILE AS $$
    SELECT string_agg(format('%s on %s', s.group_name, s.topic), ', ' ORDER BY s.group_name, s.topic)
    FROM unnest(topics, ends) AS u (topic, last) JOIN postbox.subscription s ON s.topic = u.topic
    WHERE postbox.settled_below(s.id) < u.last
$$;
COMMENT ON FUNCTION postbox.holders IS 'Which subscriptions have not passed these ends of these topics.';

CREATE FUNCTION postbox.truncate_records(of_slot smallint, kind text) RETURNS text
    LANGUAGE plpgsql
    SET lock_timeout = '25ms' SET jit = off AS $$
#variable_conflict use_column
DECLARE
    records text := format('postbox.%I', kind || '_' || of_slot);
    filled  boolean;
BEGIN
    EXECUTE format('SELECT EXISTS (SELECT FROM %s)', records) INTO filled;
    IF postbox.slot_in_use(of_slot) OR NOT filled OR NOT postbox.begin_truncation()
        OR postbox.slot_held_by(ARRAY[records::regclass]) IS NOT NULL
    THEN
        RETURN CASE WHEN filled THEN 'busy' ELSE 'empty' END;
    END IF;
    -- Before the table, as whoever reads them to write does.
    IF kind IN ('checkpoint', 'settlement') THEN
        -- No claim is under way, and the next one's look is newer than this.
        PERFORM FROM postbox.lane l ORDER BY l.subscription_id, l.lane FOR NO KEY UPDATE NOWAIT;
    ELSIF kind = 'tick' THEN
        -- Nor is a step.
        PERFORM pg_advisory_xact_lock(1347571761, 1);
    END IF;
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', records);

    CASE kind
    WHEN 'checkpoint' THEN
        -- With the number of the newest: of an owner's checkpoints older ones may be in slots that are truncated later.
        UPDATE postbox.lane l SET position = n.position, pending = n.pending, checkpoint_id = n.checkpoint_id
        FROM (
            SELECT k.subscription_id, k.lane, t.position, t.pending, c.checkpoint_id
            FROM postbox.lane k CROSS JOIN LATERAL postbox.lane_state(k.subscription_id, k.lane) t
            CROSS JOIN LATERAL (
                SELECT max(c.id) AS checkpoint_id FROM postbox.checkpoint c
                WHERE c.subscription_id = k.subscription_id AND c.consumer_id = k.consumer_id) c
            WHERE c.checkpoint_id > k.checkpoint_id
        ) n
        WHERE l.subscription_id = n.subscription_id AND l.lane = n.lane;
    WHEN 'settlement' THEN
        -- What the next owner of a lane would ask for goes to the current slot.
        INSERT INTO postbox.settlement (subscription_id, lane, "offset")
        SELECT n.subscription_id, n.lane, n."offset"
        FROM postbox.lane l CROSS JOIN LATERAL postbox.lane_state(l.subscription_id, l.lane) t
        CROSS JOIN LATERAL (
            SELECT s.* FROM postbox.settlement s
            WHERE s.slot = of_slot AND s.subscription_id = l.subscription_id AND s.lane = l.lane AND s."offset" >= t.position
            UNION
            SELECT s.* FROM postbox.settlement s
            WHERE s.slot = of_slot AND s.subscription_id = l.subscription_id AND s.lane = l.lane AND s."offset" = ANY (t.pending)) n;
    WHEN 'tick' THEN
        INSERT INTO postbox.tick (id, snapshot, at)
        SELECT n.id, n.snapshot, n.at FROM (SELECT t.* FROM postbox.tick t ORDER BY t.id DESC LIMIT 1) n WHERE n.slot = of_slot;
    WHEN 'heartbeat' THEN
        UPDATE postbox.consumer c SET heartbeat_at = n.at, report = n.report
        FROM (SELECT DISTINCT ON (h.consumer_id) h.* FROM postbox.heartbeat h WHERE h.slot = of_slot ORDER BY h.consumer_id, h.at DESC) n
        WHERE c.id = n.consumer_id AND c.heartbeat_at < n.at;
    END CASE;
    EXECUTE format('TRUNCATE ONLY %s', records);
    RETURN 'truncated';
END $$;
COMMENT ON FUNCTION postbox.truncate_records IS
    'Truncates a slot''s records of progress (checkpoint, settlement, tick, heartbeat). Needs no age, since only the newest say anything: checkpoints are written to their lanes and heartbeats to their consumers, settlements that a lane''s next owner needs and the newest tick of all go to the current slot.';

CREATE FUNCTION postbox.slots() RETURNS TABLE (
    slot smallint, current boolean, newest_at timestamptz, topics bigint, bytes bigint, overdue boolean, held_by text
)
    LANGUAGE plpgsql STABLE
    SET jit = off AS $$
#variable_conflict use_column
DECLARE
    keep  interval := (SELECT r.keep FROM postbox.retention r);
    names text[];
    ends  bigint[];
BEGIN
    FOR n IN 0..7 LOOP
        slot := n;
        current := slot = postbox.slot_of(postbox.clock());
        EXECUTE format('SELECT count(*), array_agg(t.name), array_agg(l.base + l.count), max(l.sequenced_at)
            FROM postbox.topic t CROSS JOIN LATERAL (
                SELECT s.base, s.count, s.sequenced_at FROM postbox.segment_%s s WHERE s.topic = t.name ORDER BY s.base DESC LIMIT 1) l',
            slot) INTO topics, names, ends, newest_at;
        bytes := pg_total_relation_size(format('postbox.outbox_%s', slot)) + pg_total_relation_size(format('postbox.segment_%s', slot))
            + pg_total_relation_size(format('postbox.tick_%s', slot)) + pg_total_relation_size(format('postbox.checkpoint_%s', slot))
            + pg_total_relation_size(format('postbox.settlement_%s', slot)) + pg_total_relation_size(format('postbox.heartbeat_%s', slot));
        overdue := coalesce(newest_at <= postbox.clock() - keep, false);
        held_by := CASE WHEN overdue THEN postbox.holders(names, ends) END;
        RETURN NEXT;
    END LOOP;
END $$;
COMMENT ON FUNCTION postbox.slots IS 'What is in each slot of the ring; held_by: which subscriptions have not passed what is older than is kept.';

CREATE FUNCTION postbox.held_back(
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

----------------------------------------------------------------------------------------------------- subscriptions that nobody serves

CREATE FUNCTION postbox.live_subscriptions() RETURNS TABLE (subscription_id integer)
    LANGUAGE sql STABLE AS $$
    SELECT DISTINCT s FROM postbox.sessions() l JOIN postbox.consumer c ON c.id = l.consumer_id
    CROSS JOIN LATERAL unnest(c.subscriptions) s WHERE l.in_time
$$;
COMMENT ON FUNCTION postbox.live_subscriptions IS 'Subscriptions that a live consumer serves.';

CREATE FUNCTION postbox.drop_subscription(of_subscription integer) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    name text;
BEGIN
    DELETE FROM postbox.subscription s WHERE s.id = of_subscription RETURNING format('%s on %s', s.group_name, s.topic) INTO name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no subscription %', of_subscription USING ERRCODE = 'PB002';
    END IF;
    IF of_subscription IN (SELECT * FROM postbox.live_subscriptions()) THEN
        RAISE EXCEPTION 'the subscription of % is served by a live consumer', name
            USING ERRCODE = 'PB003', HINT = 'Stop its consumers first.';
    END IF;
END $$;
COMMENT ON FUNCTION postbox.drop_subscription IS
    'Forgets a subscription, its position, its failed messages and its dead letters. It must have no live consumer.';

CREATE FUNCTION postbox.watch_subscriptions() RETURNS TABLE (expired text)
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    settings postbox.retention;
    s        postbox.subscription;
BEGIN
    SELECT * INTO settings FROM postbox.retention;
    -- While no dispatcher watched, nobody knows who was alive: the time without a consumer begins anew.
    IF settings.watched_at < postbox.clock() - interval '1 hour' THEN
        UPDATE postbox.subscription SET last_live_at = postbox.clock();
    ELSE
        UPDATE postbox.subscription s SET last_live_at = postbox.clock()
        WHERE s.last_live_at < postbox.clock() - interval '1 hour' AND s.id IN (SELECT * FROM postbox.live_subscriptions());
    END IF;
    UPDATE postbox.retention SET watched_at = postbox.clock() WHERE watched_at < postbox.clock() - interval '10 minutes';
    FOR s IN SELECT * FROM postbox.subscription s
        WHERE s.last_live_at + interval '1 hour' + settings.expire_abandoned_after < postbox.clock()
            AND s.id NOT IN (SELECT * FROM postbox.live_subscriptions())
    LOOP
        PERFORM postbox.drop_subscription(s.id);
        expired := format('%s on %s', s.group_name, s.topic);
        RETURN NEXT;
    END LOOP;
END $$;
COMMENT ON FUNCTION postbox.watch_subscriptions IS
    'Notes which subscriptions have a live consumer, and drops those that had none for longer than retention.expire_abandoned_after; returns which.';

-------------------------------------------------------------------------------------------------------------------------- replay

CREATE FUNCTION postbox.subscription_id(of_group text, of_topic text) RETURNS integer
    LANGUAGE plpgsql STABLE AS $$
DECLARE
    result integer;
BEGIN
    SELECT s.id INTO result FROM postbox.subscription s WHERE s.group_name = of_group AND s.topic = of_topic;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'group % has no subscription to topic %', of_group, of_topic
            USING ERRCODE = 'PB002', HINT = 'postbox subscriptions list shows those there are.';
    END IF;
    RETURN result;
END $$;
COMMENT ON FUNCTION postbox.subscription_id IS 'The subscription of a group to a topic, or an error (PB002).';

CREATE FUNCTION postbox.seek(of_subscription integer, start text, value text DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql
    SET jit = off AS $$
#variable_conflict use_column
DECLARE
    s      postbox.subscription;
    target bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'postbox.seek() must run in READ COMMITTED, not %', current_setting('transaction_isolation')
            USING HINT = 'What it reads must be newer than its locks.';
    END IF;
    -- A truncation in progress has this table in SHARE mode: what it truncates is gone before the target is looked up, or it sees the seek.
    UPDATE postbox.subscription SET last_live_at = last_live_at WHERE id = of_subscription RETURNING * INTO s;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no subscription %', of_subscription USING ERRCODE = 'PB002';
    END IF;
    target := postbox.start_offset(s.topic, start, value);
    IF target IS NULL THEN
        RAISE EXCEPTION 'a position is earliest, latest, offset, time or ago, not %', start USING ERRCODE = 'invalid_parameter_value';
    END IF;
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
    -- Without a word it makes every session look at once.
    PERFORM pg_notify('postbox_segment', '');
    RETURN target;
END $$;
COMMENT ON FUNCTION postbox.seek IS
    'Moves a subscription to a start position (as postbox.start_offset); from there on every message is delivered, again or for the first time. Failed messages before it stay, those after it come again from the log. Running consumers follow at once. Returns the offset.';

CREATE FUNCTION postbox.replay(of_subscription integer, from_offset bigint, to_offset bigint, at_most integer DEFAULT 1000,
    OUT next_offset bigint, OUT replayed bigint
)
    LANGUAGE plpgsql
    SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    s     postbox.subscription;
    last  bigint;
    first bigint;
BEGIN
    -- As in postbox.seek: what is being truncated is not read.
    UPDATE postbox.subscription SET last_live_at = last_live_at WHERE id = of_subscription RETURNING * INTO s;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no subscription %', of_subscription USING ERRCODE = 'PB002';
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
            o.published_at, o.type, o.key, e.key_hash, coalesce(o.headers, '{}') || '{"postbox-replayed": "1"}', o.content_type, o.payload
        FROM entries e CROSS JOIN LATERAL (
            SELECT * FROM postbox.outbox o WHERE o.slot = e.slot AND o.xid = e.xid AND o.seq = e.seq OFFSET 0) o
        ORDER BY e."offset"
        -- One that failed is still on its way.
        ON CONFLICT (subscription_id, "offset") DO NOTHING
        RETURNING 1
    )
    SELECT count(*) INTO replayed FROM copied;
    PERFORM pg_notify('postbox_segment', '');
END $$;
COMMENT ON FUNCTION postbox.replay IS
    'Has settled messages of a range of offsets run again, at most so many, without moving the subscription: they go to redelivery with a header postbox-replayed. Returns where to go on, and how many.';
