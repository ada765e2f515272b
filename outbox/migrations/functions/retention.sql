-- Retention: what may be truncated. See docs/internals/ring.md.

CREATE OR REPLACE FUNCTION postbox.set_retention(new_keep interval) RETURNS void
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

CREATE OR REPLACE FUNCTION postbox.slot_in_use(of_slot smallint) RETURNS boolean
    LANGUAGE sql VOLATILE
    RETURN (SELECT of_slot IN (postbox.slot_of(n.now), postbox.slot_of(n.now - n.margin), postbox.slot_of(n.now + n.margin))
        FROM (SELECT postbox.clock() AS now, r.keep / 72 AS margin FROM postbox.retention r) n);
COMMENT ON FUNCTION postbox.slot_in_use IS 'Whether a slot is the current one, or was or will be within a twelfth of a slot.';

CREATE OR REPLACE FUNCTION postbox.slot_held_by(tables regclass[]) RETURNS text
    LANGUAGE sql VOLATILE AS $$
    SELECT string_agg(DISTINCT CASE WHEN l.pid IS NULL THEN 'a prepared transaction' ELSE format('process %s', l.pid) END, ', ')
    FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'relation' AND l.relation = ANY (tables) AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
        AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
        AND (l.pid IS NULL OR l.mode = 'RowExclusiveLock' OR a.xact_start < clock_timestamp() - interval '1 second')
$$;
COMMENT ON FUNCTION postbox.slot_held_by IS
    'Whose transaction has written to one of these tables or has read it for longer than a second: queueing behind it would only make others wait.';

CREATE OR REPLACE FUNCTION postbox.begin_truncation() RETURNS boolean
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postbox.require_read_committed('a truncation');
    RETURN pg_try_advisory_xact_lock(1347571761, 7);
END $$;
COMMENT ON FUNCTION postbox.begin_truncation IS 'Whether nobody else is truncating.';

-- The lock timeout bounds for how long others wait behind a truncation that cannot have its lock; then it fails (55P03) and is tried again later.
CREATE OR REPLACE FUNCTION postbox.truncate_log(of_slot smallint, OUT outcome text, OUT messages bigint, OUT bytes bigint, OUT detail text)
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

CREATE OR REPLACE FUNCTION postbox.copy_parked(of_subscription integer, of_lane smallint, below bigint, at_most integer) RETURNS bigint
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
    PERFORM postbox.require_read_committed('postbox.copy_parked()');
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

CREATE OR REPLACE FUNCTION postbox.copy_parked(of_slot smallint) RETURNS text
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

CREATE OR REPLACE FUNCTION postbox.holders(topics text[], ends bigint[]) RETURNS text
    LANGUAGE sql VOLATILE AS $$
    SELECT string_agg(format('%s on %s', s.group_name, s.topic), ', ' ORDER BY s.group_name, s.topic)
    FROM unnest(topics, ends) AS u (topic, last) JOIN postbox.subscription s ON s.topic = u.topic
    WHERE postbox.settled_below(s.id) < u.last
$$;
COMMENT ON FUNCTION postbox.holders IS 'Which subscriptions have not passed these ends of these topics.';

CREATE OR REPLACE FUNCTION postbox.truncate_records(of_slot smallint, kind text) RETURNS text
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
        INSERT INTO postbox.tick (id, snapshot, at, part_look, part_seq)
        SELECT n.id, n.snapshot, n.at, n.part_look, n.part_seq FROM (SELECT t.* FROM postbox.tick t ORDER BY t.id DESC LIMIT 1) n WHERE n.slot = of_slot;
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

CREATE OR REPLACE FUNCTION postbox.slots() RETURNS TABLE (
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
