-- Restore into another cluster. See docs/internals/restore.md.

CREATE OR REPLACE FUNCTION postbox.foreign_xids() RETURNS text
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    here  bigint := postbox.system_identifier();
    known postbox.cluster;
    last  pg_snapshot;
    ahead xid8;
BEGIN
    SELECT * INTO known FROM postbox.cluster;
    IF NOT FOUND THEN
        RETURN 'it does not say which cluster its transaction ids are of';
    END IF;
    -- A younger cluster that has caught up by now is known by this alone.
    IF known.system_identifier <> here THEN
        RETURN format('its transaction ids are of cluster %s, and this is cluster %s', known.system_identifier, here);
    END IF;
    SELECT t.snapshot INTO last FROM postbox.tick t ORDER BY t.id DESC LIMIT 1;
    IF pg_snapshot_xmax(last) > pg_snapshot_xmax(pg_current_snapshot()) THEN
        RETURN format('its last step saw transactions up to %s, and this cluster is only at %s',
            pg_snapshot_xmax(last), pg_snapshot_xmax(pg_current_snapshot()));
    END IF;
    -- No row that is visible is of a transaction that has not begun. For when there was no step yet.
    SELECT o.xid INTO ahead FROM postbox.outbox o
    WHERE o.xid >= pg_snapshot_xmax(pg_current_snapshot()) AND o.xid IS DISTINCT FROM pg_current_xact_id_if_assigned() LIMIT 1;
    IF FOUND THEN
        RETURN format('it has a message of transaction %s, and this cluster is only at %s',
            ahead, pg_snapshot_xmax(pg_current_snapshot()));
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION postbox.foreign_xids IS
    'Why the transaction ids in this schema are not of this cluster, in words; null: they are.';

CREATE OR REPLACE FUNCTION postbox.rebase(
    even_if_not_needed boolean DEFAULT false, OUT reason text, OUT sequenced bigint, OUT unsequenced bigint, OUT freed_lanes bigint
)
    LANGUAGE plpgsql
    -- As many rows as there are, whatever the statistics of a fresh restore say.
    SET enable_nestloop = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    newest_tick       bigint;
    newest_seq        bigint;
    newest_checkpoint bigint;
BEGIN
    PERFORM postbox.require_read_committed('postbox.rebase()');
    -- So that this transaction's id is given after the snapshot below was taken, which thus counts it as not seen.
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION 'postbox.rebase() must run in a transaction of its own, before anything is written in it'
            USING ERRCODE = 'PB008', HINT = 'Commit first.';
    END IF;
    PERFORM pg_advisory_xact_lock(1347571761, 1);
    reason := postbox.foreign_xids();
    IF reason IS NULL THEN
        IF NOT even_if_not_needed THEN
            RETURN;
        END IF;
        reason := 'it was asked for';
    END IF;
    -- Indexes are restored after the data; that of a partitioned table is valid when all its partitions have theirs.
    IF EXISTS (
        SELECT FROM unnest(ARRAY['outbox_xid_seq', 'segment_topic_base', 'tick_newest', 'lane_pkey']) AS wanted (name)
        LEFT JOIN pg_class c ON c.relnamespace = 'postbox'::regnamespace AND c.relname = wanted.name
        LEFT JOIN pg_index i ON i.indexrelid = c.oid
        WHERE i.indisvalid IS NOT TRUE)
    THEN
        RAISE EXCEPTION 'the restore of schema postbox is not complete: its indexes are not there yet' USING ERRCODE = 'PB003',
            HINT = 'Wait until the restore has ended, or restore in one transaction (pg_restore --single-transaction).';
    END IF;
    SELECT coalesce(max(t.id), 0) INTO newest_tick FROM postbox.tick t;

    -- One statement, so one snapshot: the one that is recorded. What it sees is dealt with here; of what it does not see, no transaction
    -- is finished in it, so the next step finds it.
    WITH
    addresses AS MATERIALIZED (
        SELECT a.xid, a.seq FROM postbox.segment s, unnest(s.xids, s.seqs) AS a (xid, seq)
    ),
    -- 2 is what PostgreSQL calls frozen: older than every transaction, so no step ever looks for it.
    frozen AS (
        UPDATE postbox.outbox o SET xid = '2' FROM addresses a WHERE a.xid = o.xid AND a.seq = o.seq RETURNING 1
    ),
    -- As if published by this transaction: the next step orders them by seq, with all that is new by then.
    fresh AS (
        UPDATE postbox.outbox o SET xid = pg_current_xact_id()
        WHERE NOT EXISTS (SELECT FROM addresses a WHERE a.xid = o.xid AND a.seq = o.seq)
        RETURNING o.seq
    ),
    readdressed AS (
        UPDATE postbox.segment s SET xids = array_fill('2'::xid8, ARRAY[s.count]) RETURNING s.seqs
    ),
    tick AS (
        INSERT INTO postbox.tick (id, snapshot)
        SELECT greatest(nextval('postbox.tick_id'), newest_tick + 1), pg_current_snapshot() RETURNING id
    )
    SELECT (SELECT count(*) FROM frozen), (SELECT count(*) FROM fresh), (SELECT id FROM tick),
        greatest((SELECT max(seq) FROM fresh), (SELECT max(q) FROM readdressed r, unnest(r.seqs) q))
    INTO sequenced, unsequenced, newest_tick, newest_seq;

    -- A dump brings its sequences along; logical replication does not.
    PERFORM setval('postbox.tick_id', newest_tick) FROM postbox.tick_id t WHERE t.last_value < newest_tick;
    PERFORM setval('postbox.outbox_seq', newest_seq) FROM postbox.outbox_seq q WHERE q.last_value < newest_seq;
    SELECT greatest((SELECT max(c.id) FROM postbox.checkpoint c), (SELECT max(l.checkpoint_id) FROM postbox.lane l)) INTO newest_checkpoint;
    PERFORM setval('postbox.checkpoint_id', newest_checkpoint)
    FROM postbox.checkpoint_id c WHERE c.last_value < newest_checkpoint;

    -- Lanes of instances of the old cluster go on where they stood, and nobody is taken to have died of a message. Each lane's state is
    -- read before its owner is forgotten, and its settlements are read by whoever claims it.
    WITH gone AS MATERIALIZED (
        SELECT l.subscription_id, l.lane, s.position, s.pending
        FROM postbox.lane l CROSS JOIN LATERAL postbox.lane_state(l.subscription_id, l.lane) s
        WHERE l.consumer_id IN (
            SELECT DISTINCT o.consumer_id FROM postbox.lane o WHERE o.consumer_id IS NOT NULL AND NOT postbox.is_live(o.consumer_id))
    ),
    freed AS (
        UPDATE postbox.lane l
        SET consumer_id = NULL, epoch = l.epoch + 1, position = g.position, pending = g.pending, crashes = 0,
            changed_at = clock_timestamp()
        FROM gone g WHERE l.subscription_id = g.subscription_id AND l.lane = g.lane
        RETURNING 1
    )
    SELECT count(*) INTO freed_lanes FROM freed;
    DELETE FROM postbox.consumer c WHERE NOT postbox.is_live(c.id);

    -- So that the timers find them once more, and not at every look.
    UPDATE postbox.scheduled SET xid = pg_current_xact_id();

    INSERT INTO postbox.cluster (system_identifier) VALUES (postbox.system_identifier())
    ON CONFLICT (only_one) DO UPDATE SET system_identifier = excluded.system_identifier, since = excluded.since;
END $$;
COMMENT ON FUNCTION postbox.rebase IS
    'After a logical restore: makes the transaction ids of the schema this cluster''s own. What was sequenced keeps its offsets, what was not is sequenced by the next step. Does nothing where nothing is foreign, unless told to; reason is null then.';
