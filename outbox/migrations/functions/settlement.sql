-- (A constraint of the same name as the code, since some clients, such as diesel, tell that and not the code.)
-- Settling messages in the transaction of their handler, under whatever search_path that has, so everything is qualified
-- (search_path.sql); but unnest() of several arrays, which is syntax and has no other name.

-- A procedure: CALL is not planned, which a SELECT by a message's text would be. Of few expressions, since each is prepared anew in every transaction.
CREATE OR REPLACE PROCEDURE postbox.settle(
    by_consumer integer, of_subscription integer, of_lane integer, of_epoch integer, of_offset bigint, handling text DEFAULT 'on'
)
    LANGUAGE plpgsql AS $$
BEGIN
    -- The lock is shared, through the commit: a takeover takes it exclusively before it raises the epoch. It is never null.
    IF coalesce(handling OPERATOR(pg_catalog.<>) 'on', true)
        OR pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'read committed'
        OR pg_catalog.pg_advisory_xact_lock_shared(1347571762, of_subscription OPERATOR(pg_catalog.*) 1024 OPERATOR(pg_catalog.+) of_lane) IS NULL
    THEN
        IF coalesce(handling OPERATOR(pg_catalog.<>) 'on', true) THEN
            RAISE EXCEPTION 'the handler has ended its transaction itself' USING ERRCODE = 'PB006';
        END IF;
        RAISE EXCEPTION 'a message is settled in READ COMMITTED, not in %: begin its transaction so, and do not SET TRANSACTION in a handler', pg_catalog.current_setting('transaction_isolation')
            USING ERRCODE = 'PB008', CONSTRAINT = 'PB008',
                HINT = 'The fence must see a takeover that is newer than the transaction''s snapshot.';
    END IF;
    -- A statement of its own, with a newer snapshot than the lock.
    INSERT INTO postbox.settlement (subscription_id, lane, "offset")
    SELECT l.subscription_id, l.lane, of_offset FROM postbox.lane l
    WHERE l.subscription_id OPERATOR(pg_catalog.=) of_subscription AND l.lane OPERATOR(pg_catalog.=) of_lane AND l.epoch OPERATOR(pg_catalog.=) of_epoch
        AND l.consumer_id OPERATOR(pg_catalog.=) by_consumer;
    -- The owner's session holds its lock exclusively for as long as it lives. After a crash of PostgreSQL offsets that were
    -- never flushed may be given anew, so what a session knew is worth nothing without it.
    IF NOT FOUND OR pg_catalog.pg_try_advisory_xact_lock_shared(1347571763, by_consumer) THEN
        RAISE EXCEPTION 'lane % of subscription % is no longer owned by consumer % in epoch %',
            of_lane, of_subscription, by_consumer, of_epoch USING ERRCODE = 'PB001', CONSTRAINT = 'PB001';
    END IF;
END $$;
COMMENT ON PROCEDURE postbox.settle IS
    'The last statement of a transactional handler: settles its message in its transaction, or fails (PB001) if the lane has another owner. handling: the transaction''s setting postbox.handling, which is gone (PB006) if the handler has ended the transaction that it was given.';

CREATE OR REPLACE FUNCTION postbox.settle_batch(
    by_consumer integer, of_subscription integer, of_lanes smallint[], of_epochs integer[], lanes_of_offsets smallint[], offsets bigint[],
    handling text DEFAULT 'on'
) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    mine bigint;
BEGIN
    IF coalesce(handling OPERATOR(pg_catalog.<>) 'on', true) THEN
        RAISE EXCEPTION 'the handler has ended its transaction itself' USING ERRCODE = 'PB006';
    END IF;
    IF pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'read committed' THEN
        RAISE EXCEPTION 'a message is settled in READ COMMITTED, not in %: begin its transaction so, and do not SET TRANSACTION in a handler', pg_catalog.current_setting('transaction_isolation')
            USING ERRCODE = 'PB008', CONSTRAINT = 'PB008',
                HINT = 'The fence must see a takeover that is newer than the transaction''s snapshot.';
    END IF;
    -- As in settle. In order, so that two calls, or a call and a seek, cannot wait for each other.
    PERFORM pg_catalog.pg_advisory_xact_lock_shared(1347571762, of_subscription OPERATOR(pg_catalog.*) 1024 OPERATOR(pg_catalog.+) u.lane)
    FROM (SELECT l.lane FROM pg_catalog.unnest(of_lanes) AS l (lane) ORDER BY 1) u;
    SELECT pg_catalog.count(*) INTO mine
    FROM unnest(of_lanes, of_epochs) AS u (lane, epoch)
    JOIN postbox.lane l ON l.subscription_id OPERATOR(pg_catalog.=) of_subscription AND l.lane OPERATOR(pg_catalog.=) u.lane AND l.epoch OPERATOR(pg_catalog.=) u.epoch
        AND l.consumer_id OPERATOR(pg_catalog.=) by_consumer;
    IF mine OPERATOR(pg_catalog.<) pg_catalog.cardinality(of_lanes) OR pg_catalog.pg_try_advisory_xact_lock_shared(1347571763, by_consumer) THEN
        RAISE EXCEPTION 'consumer % no longer owns all of the lanes % of subscription %', by_consumer, of_lanes, of_subscription
            USING ERRCODE = 'PB001', CONSTRAINT = 'PB001';
    END IF;
    INSERT INTO postbox.settlement (subscription_id, lane, "offset")
    SELECT of_subscription, u.lane, u."offset" FROM unnest(lanes_of_offsets, offsets) AS u (lane, "offset");
END $$;
COMMENT ON FUNCTION postbox.settle_batch IS
    'As postbox.settle, for messages of several lanes: all of them, or none if any of the lanes has another owner.';

CREATE OR REPLACE FUNCTION postbox.idle_for_at_most(milliseconds integer) RETURNS text
    LANGUAGE plpgsql AS $$
DECLARE
    now_it_is text := pg_catalog.current_setting('idle_in_transaction_session_timeout');
BEGIN
    IF now_it_is OPERATOR(pg_catalog.=) '0'
        OR now_it_is::interval OPERATOR(pg_catalog.>) (milliseconds::pg_catalog.text OPERATOR(pg_catalog.||) ' ms')::interval
    THEN
        RETURN pg_catalog.set_config('idle_in_transaction_session_timeout', milliseconds::pg_catalog.text, true);
    END IF;
    RETURN now_it_is;
END $$;
COMMENT ON FUNCTION postbox.idle_for_at_most IS
    'Has the server end this transaction if it is idle for so long, unless it does so earlier: what is settled and not committed holds off whoever takes the lane over.';
