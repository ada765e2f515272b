-- Time: messages for later, recurring messages. See ARCHITECTURE.md, "Time".

------------------------------------------------------------------------------------------------------------ messages for later

CREATE SEQUENCE postbox.scheduled_n AS bigint CACHE 1;
COMMENT ON SEQUENCE postbox.scheduled_n IS 'Order of scheduling, for messages that are due at the same instant.';

CREATE TABLE postbox.scheduled (
    id           uuid        PRIMARY KEY DEFAULT postbox.uuid7(),
    deliver_at   timestamptz NOT NULL,
    n            bigint      NOT NULL DEFAULT nextval('postbox.scheduled_n'),
    xid          xid8        NOT NULL DEFAULT pg_current_xact_id(),
    topic        text        NOT NULL,
    type         text,
    key          text,
    headers      jsonb,
    content_type text,
    payload      bytea       NOT NULL,
    expires_at   timestamptz,
    scheduled_at timestamptz NOT NULL DEFAULT postbox.clock()
);
COMMENT ON TABLE postbox.scheduled IS
    'One row is a message for later. Written by postbox.publish in the publisher''s transaction; moved to the outbox by postbox.promote when it is due; until then postbox.cancel deletes and postbox.reschedule updates it.';
COMMENT ON COLUMN postbox.scheduled.id IS 'Message id; the message keeps it.';
COMMENT ON COLUMN postbox.scheduled.deliver_at IS 'When it is due.';
COMMENT ON COLUMN postbox.scheduled.n IS 'Order among those that are due at the same instant.';
COMMENT ON COLUMN postbox.scheduled.xid IS
    'The top-level transaction that scheduled or rescheduled it: by it a dispatcher finds what became visible since its last look.';
COMMENT ON COLUMN postbox.scheduled.topic IS 'As in the outbox.';
COMMENT ON COLUMN postbox.scheduled.type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.scheduled.key IS 'As in the outbox.';
COMMENT ON COLUMN postbox.scheduled.headers IS 'As in the outbox.';
COMMENT ON COLUMN postbox.scheduled.content_type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.scheduled.payload IS 'As in the outbox.';
COMMENT ON COLUMN postbox.scheduled.expires_at IS 'As in the outbox.';
COMMENT ON COLUMN postbox.scheduled.scheduled_at IS 'When it was first scheduled.';

CREATE UNIQUE INDEX scheduled_due ON postbox.scheduled (deliver_at, n);
CREATE INDEX scheduled_xid ON postbox.scheduled (xid);

CREATE FUNCTION postbox.due_time(deliver_at timestamptz, delay interval) RETURNS timestamptz
    LANGUAGE plpgsql VOLATILE PARALLEL SAFE AS $$
DECLARE
    now timestamptz := postbox.clock();
    due timestamptz := coalesce(deliver_at, now + delay);
BEGIN
    IF deliver_at IS NOT NULL AND delay IS NOT NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = 'deliver_at and delay exclude each other: give one of them';
    ELSIF due = 'infinity' THEN
        RAISE invalid_parameter_value USING MESSAGE = 'a message cannot be due at infinity: give an instant';
    ELSIF due <= now THEN
        RETURN NULL;
    END IF;
    RETURN due;
END $$;
COMMENT ON FUNCTION postbox.due_time IS 'When a message is due that is to be delivered at an instant or after a span; null: now.';

CREATE FUNCTION postbox.ring_timers() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    -- As in postbox.ring_bell.
    IF current_setting('postbox.two_phase', true) IS DISTINCT FROM 'on' THEN
        PERFORM pg_notify('postbox_scheduled', '');
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION postbox.ring_timers IS 'Wakes the dispatcher''s timers.';

-- The bell of the outbox, for those rows only that may be due before the dispatcher looks again by itself.
CREATE TRIGGER ring_timers BEFORE INSERT OR UPDATE OF deliver_at ON postbox.scheduled FOR EACH ROW
    WHEN (NEW.deliver_at < postbox.clock() + interval '1 minute' AND NOT pg_try_advisory_xact_lock_shared(1347571761, 5))
    EXECUTE FUNCTION postbox.ring_timers();
COMMENT ON TRIGGER ring_timers ON postbox.scheduled IS
    'Wakes the dispatcher''s timers when they sleep and the message is due within a minute.';

CREATE FUNCTION postbox.cancel(id uuid) RETURNS boolean
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    DELETE FROM postbox.scheduled s WHERE s.id = cancel.id;
    RETURN FOUND;
END $$;
COMMENT ON FUNCTION postbox.cancel IS
    'Cancels a message that is not yet due, in the caller''s transaction. False: it was not pending (delivered, cancelled before, or never scheduled).';

CREATE FUNCTION postbox.reschedule(id uuid, deliver_at timestamptz) RETURNS boolean
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    IF reschedule.deliver_at = 'infinity' THEN
        RAISE invalid_parameter_value USING MESSAGE = 'a message cannot be due at infinity: give an instant';
    END IF;
    UPDATE postbox.scheduled s SET deliver_at = reschedule.deliver_at, n = DEFAULT, xid = DEFAULT WHERE s.id = reschedule.id;
    RETURN FOUND;
END $$;
COMMENT ON FUNCTION postbox.reschedule IS
    'Moves a message that is not yet due to another instant, in the caller''s transaction; in the past means now. Its expiry stays. False: it was not pending.';

CREATE FUNCTION postbox.promote(
    INOUT last_look pg_snapshot, INOUT start_at timestamptz, INOUT start_n bigint, INOUT held uuid[], at_most integer,
    OUT promoted bigint, OUT is_full boolean, OUT is_fresh boolean, OUT due_in double precision
)
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    now       timestamptz;
    last_xmax xid8;
    last_xip  xid8[];
    fresh     record;
    last      record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' OR pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION 'postbox.promote() must run in a READ COMMITTED transaction of its own, before anything is written in it'
            USING HINT = 'Its snapshots must be taken after its lock, and a snapshot does not tell its own transaction''s rows.';
    END IF;
    -- One at a time, so that messages come into the outbox in the order in which they are due.
    PERFORM pg_advisory_xact_lock(1347571761, 6);
    promoted := 0;
    is_full := false;
    is_fresh := false;

    -- The invariant: every row that last_look sees lies at or behind (start_at, start_n), or is among held.
    IF last_look IS NULL THEN
        last_look := pg_current_snapshot();
        start_at := '-infinity';
        start_n := 0;
        held := '{}';
    ELSIF last_look::text <> pg_current_snapshot()::text THEN
        last_xmax := pg_snapshot_xmax(last_look);
        last_xip := ARRAY(SELECT pg_snapshot_xip(last_look));
        -- What became visible since then, as the sequencer finds what is new.
        SELECT f.deliver_at, f.n, pg_current_snapshot() AS look INTO fresh
        FROM (SELECT) AS one LEFT JOIN LATERAL (
            SELECT s.deliver_at, s.n FROM postbox.scheduled s WHERE s.xid >= last_xmax
            UNION ALL
            SELECT s.deliver_at, s.n FROM postbox.scheduled s WHERE s.xid = ANY (last_xip)
            ORDER BY 1, 2 LIMIT 1
        ) f ON true;
        last_look := fresh.look;
        is_fresh := coalesce(fresh.deliver_at < postbox.clock() + interval '1 minute', false);
        IF (fresh.deliver_at, fresh.n) < (start_at, start_n) THEN
            start_at := fresh.deliver_at;
            start_n := fresh.n;
        END IF;
    END IF;

    now := postbox.clock();
    IF start_at <= now OR held <> '{}' THEN
        WITH candidate AS MATERIALIZED (
            (SELECT s.ctid AS place, s.id, s.deliver_at, s.n, true AS is_ahead FROM postbox.scheduled s
            WHERE (s.deliver_at, s.n) >= (start_at, start_n) AND s.deliver_at <= now
            ORDER BY s.deliver_at, s.n LIMIT at_most)
            UNION ALL
            SELECT s.ctid, s.id, s.deliver_at, s.n, false FROM postbox.scheduled s
            WHERE s.id = ANY (held) AND s.deliver_at <= now AND (s.deliver_at, s.n) < (start_at, start_n)
        ),
        -- A transaction that cancels or reschedules one and is still open must not hold up the others.
        locked AS MATERIALIZED (
            SELECT s.ctid AS place FROM postbox.scheduled s
            WHERE s.ctid = ANY (ARRAY(SELECT c.place FROM candidate c)) AND s.deliver_at <= now
            FOR UPDATE SKIP LOCKED
        ),
        -- The due time again: if it was rescheduled meanwhile, the condition is checked with its new row.
        gone AS (
            DELETE FROM postbox.scheduled s
            WHERE s.ctid = ANY (ARRAY(SELECT l.place FROM locked l)) AND s.deliver_at <= now
            RETURNING s.*
        ),
        published AS (
            INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload, expires_at)
            SELECT g.id, g.topic, g.type, g.key, g.headers, g.content_type, g.payload, g.expires_at
            FROM gone g ORDER BY g.deliver_at, g.n
            RETURNING id
        )
        SELECT (SELECT count(*) FROM published) AS promoted,
            ARRAY(SELECT c.id FROM candidate c WHERE c.id NOT IN (SELECT p.id FROM published p)) AS held,
            count(*) = at_most AS is_full, max(a.deliver_at) AS deliver_at,
            (array_agg(a.n ORDER BY a.deliver_at DESC, a.n DESC))[1] AS n
        INTO last FROM candidate a WHERE a.is_ahead;
        promoted := last.promoted;
        held := last.held;
        is_full := last.is_full;
        IF last.deliver_at IS NOT NULL THEN
            start_at := last.deliver_at;
            start_n := last.n + 1;
        END IF;
        IF NOT is_full THEN
            -- On to the next one that is there, so that the dead rows before it are passed once, not at every look.
            SELECT s.deliver_at, s.n INTO last FROM postbox.scheduled s
            WHERE (s.deliver_at, s.n) >= (start_at, start_n) ORDER BY s.deliver_at, s.n LIMIT 1;
            start_at := coalesce(last.deliver_at, 'infinity');
            start_n := coalesce(last.n, 0);
        END IF;
    END IF;
    IF start_at < 'infinity' THEN
        due_in := greatest(extract(epoch FROM start_at - postbox.clock()), 0);
    END IF;
END $$;
COMMENT ON FUNCTION postbox.promote IS
    'Moves up to at_most due messages to the outbox, in the order in which they are due, and says in how many seconds the next is due. A caller passes back what it was returned (nulls at first), so that a look costs the same however many were promoted or cancelled before. held: due messages that an open transaction cancels or reschedules. Any number may call it at once.';

-------------------------------------------------------------------------------------------------------------- recurring messages

CREATE TABLE postbox.cron (
    name         text        PRIMARY KEY,
    schedule     text        NOT NULL,
    time_zone    text        NOT NULL,
    missed       text        NOT NULL CHECK (missed IN ('skip', 'once', 'all')),
    paused       boolean     NOT NULL DEFAULT false,
    topic        text        NOT NULL,
    type         text,
    key          text,
    headers      jsonb,
    content_type text,
    payload      bytea       NOT NULL,
    expires_in   interval,
    next_at      timestamptz,
    last_at      timestamptz,
    created_at   timestamptz NOT NULL DEFAULT postbox.clock()
) WITH (fillfactor = 50);
COMMENT ON TABLE postbox.cron IS
    'One row is a recurring message. Written by consumers at their start, by the API and by operators; updated by the dispatcher at each firing. Few rows, and no index on what changes, so that a firing is a HOT update.';
COMMENT ON COLUMN postbox.cron.name IS 'Name of the schedule.';
COMMENT ON COLUMN postbox.cron.schedule IS 'Cron expression: five fields, six with seconds, or @hourly, @daily, @weekly, @monthly, @yearly.';
COMMENT ON COLUMN postbox.cron.time_zone IS 'IANA time zone in which the expression is read.';
COMMENT ON COLUMN postbox.cron.missed IS
    'What becomes of due times that passed while no dispatcher ran. skip: nothing; once: one firing, for the latest; all: each, the latest 1,000 at most.';
COMMENT ON COLUMN postbox.cron.paused IS 'Whether it does not fire.';
COMMENT ON COLUMN postbox.cron.topic IS 'As in the outbox.';
COMMENT ON COLUMN postbox.cron.type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.cron.key IS 'As in the outbox.';
COMMENT ON COLUMN postbox.cron.headers IS 'As in the outbox; a firing adds postbox-cron and postbox-scheduled-at.';
COMMENT ON COLUMN postbox.cron.content_type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.cron.payload IS 'As in the outbox.';
COMMENT ON COLUMN postbox.cron.expires_in IS 'How long after the firing its message expires. Null: never.';
COMMENT ON COLUMN postbox.cron.next_at IS 'The next due time. Null: never again.';
COMMENT ON COLUMN postbox.cron.last_at IS 'The due time of the last firing.';
COMMENT ON COLUMN postbox.cron.created_at IS 'When it was first registered.';

CREATE FUNCTION postbox.ring_cron() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('postbox_cron', '');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION postbox.ring_cron IS 'Tells dispatchers that schedules have changed.';

CREATE TRIGGER ring_cron AFTER INSERT OR UPDATE OF schedule, paused ON postbox.cron FOR EACH STATEMENT
    EXECUTE FUNCTION postbox.ring_cron();
COMMENT ON TRIGGER ring_cron ON postbox.cron IS 'A schedule changes rarely, so this one rings always; not at firings.';

CREATE FUNCTION postbox.fire(
    of_cron text, of_schedule text, of_time_zone text, expected timestamptz, due timestamptz[], following timestamptz
) RETURNS boolean
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    c postbox.cron;
BEGIN
    -- Whoever comes second waits for the row and finds that next_at has moved on.
    UPDATE postbox.cron u
    SET next_at = following, last_at = greatest(u.last_at, (SELECT max(d) FROM unnest(due) d))
    WHERE u.name = of_cron AND u.schedule = of_schedule AND u.time_zone = of_time_zone AND NOT u.paused
        AND u.next_at = expected AND u.next_at <= postbox.clock()
    RETURNING u.* INTO c;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF EXISTS (SELECT FROM unnest(due) d WHERE d > postbox.clock()) THEN
        RAISE EXCEPTION 'a firing of % would be early', of_cron;
    END IF;
    IF due <> '{}' THEN
        INSERT INTO postbox.outbox (topic, type, key, headers, content_type, payload, expires_at)
        SELECT c.topic, c.type, c.key,
            coalesce(c.headers, '{}') || jsonb_build_object('postbox-cron', c.name,
                'postbox-scheduled-at', to_char(d.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')),
            c.content_type, c.payload, postbox.clock() + c.expires_in
        FROM unnest(due) WITH ORDINALITY AS d (at, n) ORDER BY d.n;
    END IF;
    RETURN true;
END $$;
COMMENT ON FUNCTION postbox.fire IS
    'Fires a schedule for its due times and moves it on to the following one, in one transaction; false if another dispatcher did, or the schedule was changed.';
