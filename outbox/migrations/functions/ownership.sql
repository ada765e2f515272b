-- Ownership of lanes: claims, checkpoints, releases. See docs/internals/ownership.md.

CREATE OR REPLACE FUNCTION postbox.lane_state(of_subscription integer, of_lane smallint) RETURNS TABLE (
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
    -- The newest that has the lane, under this ownership. A consumer writes one row for all its lanes, but for those that it is about to release: if it dies
    -- before it does, what counts is older than its newest row, and the baseline is older than what became of messages since.
    SELECT * INTO c FROM postbox.checkpoint
    WHERE subscription_id = of_subscription AND consumer_id = l.consumer_id AND id > l.checkpoint_id
        AND epochs[array_position(lanes, of_lane)] = l.epoch
    ORDER BY id DESC LIMIT 1;
    n := array_position(c.lanes, of_lane);
    IF n IS NOT NULL THEN
        l.position := c.positions[n];
        l.pending := CASE WHEN c.pending_lanes IS NULL THEN c.pending
            ELSE ARRAY(SELECT p."offset" FROM unnest(c.pending, c.pending_lanes) AS p ("offset", lane) WHERE p.lane = of_lane) END;
    END IF;
    RETURN QUERY SELECT l.consumer_id, l.epoch, l.position, l.pending;
END $$;
COMMENT ON FUNCTION postbox.lane_state IS 'Where a lane stands: its baseline, or its owner''s newest checkpoint.';

CREATE OR REPLACE FUNCTION postbox.checkpoint(
    by_consumer integer, subscriptions integer[], lanes smallint[], epochs integer[], positions bigint[],
    pending_subscriptions integer[], pending_offsets bigint[], lanes_of_pending smallint[] DEFAULT NULL
) RETURNS bigint
    LANGUAGE plpgsql
    SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    accepted bigint;
BEGIN
    PERFORM postbox.require_read_committed('postbox.checkpoint()');
    WITH written AS (
        INSERT INTO postbox.checkpoint (subscription_id, consumer_id, lanes, epochs, positions, pending, pending_lanes)
        SELECT i.subscription_id, by_consumer, array_agg(i.lane), array_agg(i.epoch), array_agg(i.position),
            ARRAY(SELECT p."offset" FROM unnest(pending_subscriptions, pending_offsets) AS p (subscription_id, "offset")
                WHERE p.subscription_id = i.subscription_id),
            CASE WHEN lanes_of_pending IS NOT NULL THEN
                ARRAY(SELECT p.lane FROM unnest(pending_subscriptions, lanes_of_pending) AS p (subscription_id, lane)
                    WHERE p.subscription_id = i.subscription_id) END
        FROM unnest(subscriptions, lanes, epochs, positions) AS i (subscription_id, lane, epoch, position)
        JOIN postbox.lane l ON l.subscription_id = i.subscription_id AND l.lane = i.lane AND l.epoch = i.epoch
            AND l.consumer_id = by_consumer
        GROUP BY i.subscription_id
        RETURNING cardinality(lanes) AS lanes
    )
    SELECT coalesce(sum(w.lanes), 0) INTO accepted FROM written w;
    RETURN accepted;
END $$;
COMMENT ON FUNCTION postbox.checkpoint IS
    'Appends how far a consumer''s lanes are settled; a lane whose epoch is stale is left out. Returns how many were accepted.';

CREATE OR REPLACE FUNCTION postbox.claim(
    by_consumer integer, of_subscription integer, wanted smallint[], seen_epochs integer[], owners_died boolean[]
)
    RETURNS TABLE (lane smallint, epoch integer, "position" bigint, pending bigint[], done bigint[], crashes integer, needs text[])
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    w       record;
    state   record;
    settled bigint[];
    died    integer;
    wants   text[];
BEGIN
    PERFORM postbox.require_read_committed('postbox.claim()');
    FOR w IN SELECT * FROM unnest(wanted, seen_epochs, owners_died) AS u (lane, epoch, died) ORDER BY 1 LOOP
        -- Exclusive: a transactional handler holds it shared from its check of the epoch through its commit, and so does whoever writes
        -- redelivery. If one is just committing, the lane is claimed at the next try.
        CONTINUE WHEN NOT pg_try_advisory_xact_lock(1347571762, of_subscription * 1024 + w.lane);
        PERFORM FROM postbox.lane l
            WHERE l.subscription_id = of_subscription AND l.lane = w.lane AND l.epoch = w.epoch FOR UPDATE;
        CONTINUE WHEN NOT FOUND;
        SELECT * INTO state FROM postbox.lane_state(of_subscription, w.lane);
        settled := ARRAY(
            SELECT s."offset" FROM postbox.settlement s
            WHERE s.subscription_id = of_subscription AND s.lane = w.lane AND s."offset" >= state.position
            UNION
            SELECT s."offset" FROM postbox.settlement s
            WHERE s.subscription_id = of_subscription AND s.lane = w.lane AND s."offset" = ANY (state.pending));
        -- Its handler committed, but the owner died before it took the row away.
        DELETE FROM postbox.redelivery r
        WHERE r.subscription_id = of_subscription AND r.lane = w.lane AND r.state <> 'redriven' AND EXISTS (
            SELECT FROM postbox.settlement s
            WHERE s.subscription_id = of_subscription AND s.lane = w.lane AND s."offset" = r."offset");
        UPDATE postbox.lane l
        SET epoch = w.epoch + 1, consumer_id = by_consumer, position = state.position, pending = state.pending,
            -- The new owner's are to come, so nobody looks for them among older ones.
            checkpoint_id = greatest(l.checkpoint_id, coalesce(pg_sequence_last_value('postbox.checkpoint_id'), 0)),
            crashes = l.crashes + w.died::integer, changed_at = clock_timestamp()
        WHERE l.subscription_id = of_subscription AND l.lane = w.lane
        RETURNING l.crashes, l.needs INTO died, wants;
        RETURN QUERY SELECT w.lane, w.epoch + 1, state.position, state.pending, settled, died, wants;
    END LOOP;
END $$;
COMMENT ON FUNCTION postbox.claim IS
    'Makes a consumer the owner of those lanes that still have the epoch it saw, and says where each stands: done are offsets settled by transactional handlers beyond position or in pending. owners_died: whether the last owner is dead, not gone in order.';

CREATE OR REPLACE FUNCTION postbox.release(
    by_consumer integer, of_subscription integer, lanes smallint[], epochs integer[], positions bigint[], still_pending bigint[],
    lanes_of_pending smallint[] DEFAULT NULL
) RETURNS void
    LANGUAGE sql VOLATILE AS $$
    WITH freed AS (
        UPDATE postbox.lane l
        -- Who handles what it needs may be who died of it.
        SET consumer_id = NULL, position = r.position, crashes = CASE l.needs WHEN '{}' THEN 0 ELSE l.crashes END,
            pending = CASE WHEN lanes_of_pending IS NULL THEN still_pending
                ELSE ARRAY(SELECT p."offset" FROM unnest(still_pending, lanes_of_pending) AS p ("offset", lane) WHERE p.lane = r.lane) END,
            changed_at = clock_timestamp()
        FROM unnest(lanes, epochs, positions) AS r (lane, epoch, position)
        WHERE l.subscription_id = of_subscription AND l.lane = r.lane AND l.epoch = r.epoch AND l.consumer_id = by_consumer
        RETURNING l.needs
    )
    -- Without a word it makes every session look at once.
    SELECT pg_notify('postbox_segment', '') FROM freed f WHERE f.needs <> '{}' LIMIT 1
$$;
COMMENT ON FUNCTION postbox.release IS
    'Frees lanes that a consumer owns, with where they stand. If one needs another instance, all look at once.';
