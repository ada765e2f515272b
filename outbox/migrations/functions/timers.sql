-- Messages for later: promoted to the outbox when they are due. See docs/internals/time.md.

CREATE OR REPLACE FUNCTION postbox.promote(
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
            USING ERRCODE = 'PB008', HINT = 'Its snapshots must be taken after its lock, and a snapshot does not tell its own transaction''s rows.';
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
