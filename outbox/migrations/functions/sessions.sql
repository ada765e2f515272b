-- Sessions of consumers: who is alive.

CREATE OR REPLACE FUNCTION postbox.is_live(of_consumer integer) RETURNS boolean
    LANGUAGE sql STABLE
    RETURN EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 1347571763 AND l.objid = of_consumer::oid
        AND l.objsubid = 2 AND l.granted AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()));
COMMENT ON FUNCTION postbox.is_live IS 'Whether a consumer''s session holds its lock.';

CREATE OR REPLACE FUNCTION postbox.register(with_name text, of_pid integer, of_subscriptions integer[], with_lease interval, not_again integer[],
    with_types jsonb DEFAULT '{}')
    RETURNS integer
    LANGUAGE plpgsql AS $$
DECLARE
    new_id integer;
BEGIN
    LOOP
        new_id := postbox.random_id();
        -- Nobody's: no instance's, alive or gone, no lane's, and none of the caller's own earlier ones. The lock is the session's.
        IF new_id <> ALL (not_again) AND NOT EXISTS (SELECT FROM postbox.lane l WHERE l.consumer_id = new_id)
            AND pg_try_advisory_lock(1347571763, new_id)
        THEN
            INSERT INTO postbox.consumer (id, name, pid, subscriptions, lease, types)
            VALUES (new_id, with_name, of_pid, of_subscriptions, with_lease, with_types)
            ON CONFLICT (id) DO NOTHING;
            EXIT WHEN FOUND;
            PERFORM pg_advisory_unlock(1347571763, new_id);
        END IF;
    END LOOP;
    -- On the bell: it wants to be woken.
    PERFORM pg_advisory_lock_shared(1347571761, 3);
    -- Without a word it makes every session look at once: what waits for a type that it handles is its.
    PERFORM pg_notify('postbox_segment', '');
    RETURN new_id;
END $$;
COMMENT ON FUNCTION postbox.register IS
    'Registers a consumer in its own session, which holds its lock from then on and is notified of steps; returns its number.';

CREATE OR REPLACE FUNCTION postbox.heartbeat(of_consumer integer, said jsonb, last_beat integer) RETURNS integer
    LANGUAGE plpgsql AS $$
DECLARE
    beat integer := coalesce(last_beat, 0) % 2147483647 + 1;
BEGIN
    IF NOT EXISTS (SELECT FROM postbox.consumer c WHERE c.id = of_consumer) THEN
        RETURN NULL;
    END IF;
    -- The new one first, so that nobody sees none.
    PERFORM pg_advisory_lock_shared(1347571767, beat);
    PERFORM pg_advisory_unlock_shared(1347571767, last_beat);
    INSERT INTO postbox.heartbeat (consumer_id, beat, report) VALUES (of_consumer, beat, said);
    RETURN beat;
END $$;
COMMENT ON FUNCTION postbox.heartbeat IS
    'A consumer says, in its own session, that it is alive, and of itself what postbox status shows. Returns a number to pass to the next call; null: it is not registered any more.';

CREATE OR REPLACE FUNCTION postbox.sessions() RETURNS TABLE (consumer_id integer, beat integer)
    LANGUAGE sql STABLE AS $$
    -- Once, so that a session and its heartbeat are of one moment.
    WITH locks AS MATERIALIZED (
        SELECT l.classid::bigint AS class, l.objid::bigint AS number, l.pid FROM pg_locks l
        WHERE l.locktype = 'advisory' AND l.classid IN (1347571763, 1347571767) AND l.objsubid = 2 AND l.granted
            AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
    )
    SELECT s.number::integer, coalesce(max(h.number), 0)::integer
    FROM locks s LEFT JOIN locks h ON h.class = 1347571767 AND h.pid = s.pid
    WHERE s.class = 1347571763 GROUP BY s.number
$$;
COMMENT ON FUNCTION postbox.sessions IS
    'The consumers whose sessions hold their locks, and the number of their last heartbeat (0: none yet). One whose number stays the same for its lease is frozen, or its host is gone: that takes two looks, and no clock of the database, which may be set.';

CREATE OR REPLACE FUNCTION postbox.last_report(of_consumer integer, OUT heartbeat_at timestamptz, OUT report jsonb)
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    newest integer;
BEGIN
    SELECT h.beat, h.at, h.report INTO newest, heartbeat_at, report FROM postbox.heartbeat h
    WHERE h.consumer_id = of_consumer ORDER BY h.beat DESC LIMIT 1;
    IF NOT FOUND OR newest < (SELECT c.beat FROM postbox.consumer c WHERE c.id = of_consumer) THEN
        SELECT c.heartbeat_at, c.report INTO heartbeat_at, report FROM postbox.consumer c WHERE c.id = of_consumer;
    END IF;
END $$;
COMMENT ON FUNCTION postbox.last_report IS 'When a consumer, alive or not, had its last heartbeat, and what it said.';

CREATE OR REPLACE FUNCTION postbox.live_subscriptions() RETURNS TABLE (subscription_id integer)
    LANGUAGE sql STABLE AS $$
    SELECT DISTINCT s FROM postbox.sessions() l JOIN postbox.consumer c ON c.id = l.consumer_id
    CROSS JOIN LATERAL unnest(c.subscriptions) s
$$;
COMMENT ON FUNCTION postbox.live_subscriptions IS
    'Subscriptions that a consumer serves whose session is there. One that is frozen counts: whoever drops or expires subscriptions is to err on this side.';
