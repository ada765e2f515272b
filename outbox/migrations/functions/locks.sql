-- Who holds what Postbox needs. Any role may take an advisory lock of any number, and keep it.

CREATE OR REPLACE FUNCTION postbox.lock_holders(for_longer_than interval DEFAULT '5 seconds') RETURNS TABLE (
    lock text, pid integer, who text, state text, held_for interval, waiting bigint, consequence text, hint text
)
    LANGUAGE sql STABLE AS $$
    WITH locks AS MATERIALIZED (
        SELECT l.*, l.classid::bigint AS class, l.objid::bigint AS number, n.name AS relation_name
        FROM pg_locks l
        LEFT JOIN LATERAL (
            SELECT c.oid::regclass::text AS name FROM pg_class c
            WHERE l.locktype = 'relation' AND c.oid = l.relation AND c.relnamespace = to_regnamespace('postbox')) n ON true
        WHERE l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
            AND (n.name IS NOT NULL OR l.locktype = 'advisory' AND l.objsubid = 2 AND l.classid BETWEEN 1347571761 AND 1347571767)
    ),
    held AS (
        SELECT l.*, a.usename, a.application_name, a.client_addr, a.state AS doing, p.gid, p.owner,
            coalesce(clock_timestamp() - CASE a.state WHEN 'idle' THEN a.state_change ELSE coalesce(a.xact_start, p.prepared) END, '0') AS held_for,
            a.application_name IN ('postbox dispatcher', 'postbox timers', 'postbox consumer') AS of_postbox
        FROM locks l
        LEFT JOIN pg_stat_activity a ON a.pid = l.pid
        -- A prepared transaction keeps the virtual id of the session that prepared it; its own id is a lock, too.
        LEFT JOIN pg_prepared_xacts p ON l.pid IS NULL AND EXISTS (
            SELECT FROM pg_locks x WHERE x.locktype = 'transactionid' AND x.pid IS NULL
                AND x.virtualtransaction = l.virtualtransaction AND x.transactionid = p.transaction)
        WHERE l.granted
    ),
    named AS (
        SELECT h.*, CASE
            WHEN h.relation_name IS NOT NULL THEN CASE WHEN h.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
                THEN 'nothing is written to ' || h.relation_name || ' meanwhile' END
            -- Held for the length of a transaction of Postbox's; by a session that is idle, never.
            WHEN h.class = 1347571761 THEN CASE h.number
                WHEN 1 THEN 'no message is put in order, so none is delivered'
                WHEN 2 THEN CASE WHEN h.mode = 'ExclusiveLock' AND NOT h.of_postbox THEN 'messages come up to a second late'
                    WHEN h.doing = 'idle' AND NOT h.of_postbox THEN 'dispatchers poll all the time' END
                WHEN 3 THEN CASE WHEN h.mode = 'ExclusiveLock' THEN 'no consumer can start' END
                WHEN 4 THEN 'nobody can migrate'
                WHEN 5 THEN CASE WHEN h.mode = 'ExclusiveLock' AND NOT h.of_postbox THEN 'scheduled messages come up to a second late'
                    WHEN h.doing = 'idle' AND NOT h.of_postbox THEN 'dispatchers poll all the time' END
                WHEN 6 THEN 'no scheduled message is delivered'
                WHEN 7 THEN 'old messages are not removed' END
            WHEN h.class = 1347571762 THEN 'no instance can take over lane ' || h.number % 1024 || ' of subscription ' || h.number / 1024
                || CASE h.mode WHEN 'ExclusiveLock' THEN ', and nothing is settled in it' ELSE '' END
            WHEN h.class = 1347571763 AND NOT h.of_postbox THEN 'the consumer with this number cannot start, or seems alive when it is not'
            WHEN h.class = 1347571764 AND h.doing = 'idle' THEN 'ordered messages of a key cannot be published'
            WHEN h.class = 1347571767 AND h.mode = 'ExclusiveLock' THEN 'consumers cannot say that they are alive'
        END AS consequence
        FROM held h
    )
    SELECT coalesce(n.relation_name, format('advisory lock (%s, %s)', n.class, n.number)), n.pid,
        concat_ws(' ', coalesce(n.usename, n.owner), nullif(n.application_name, ''), host(n.client_addr)),
        coalesce(n.doing, CASE WHEN n.gid IS NOT NULL THEN 'prepared' ELSE 'unknown' END), n.held_for,
        (SELECT count(*) FROM locks w WHERE NOT w.granted AND w.locktype = n.locktype AND w.relation IS NOT DISTINCT FROM n.relation
            AND w.class IS NOT DISTINCT FROM n.class AND w.number IS NOT DISTINCT FROM n.number),
        n.consequence,
        CASE WHEN n.gid IS NOT NULL THEN format('ROLLBACK PREPARED %L', n.gid) ELSE format('SELECT pg_terminate_backend(%s)', n.pid) END
    FROM named n
    WHERE n.consequence IS NOT NULL AND n.held_for >= for_longer_than AND n.pid IS DISTINCT FROM pg_backend_pid()
    ORDER BY n.held_for DESC LIMIT 20
$$;
COMMENT ON FUNCTION postbox.lock_holders IS
    'Who has held a lock that Postbox needs for longer than that, what comes of it, and the statement that ends it. Of other roles'' sessions it is not known for how long, but to roles that may see them (pg_monitor).';
