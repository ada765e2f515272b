-- Failure: what became of messages that could not be handled at once. See docs/internals/failure.md.

CREATE OR REPLACE FUNCTION postbox.copy_unread(of_subscription integer, of_lane smallint, of_offset bigint) RETURNS void
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    place record;
BEGIN
    SELECT s.slot, s.xids[of_offset - s.base + 1] AS xid, s.seqs[of_offset - s.base + 1] AS seq, s.keys[of_offset - s.base + 1] AS key_hash
    INTO place
    FROM postbox.segment s
    WHERE s.topic = (SELECT b.topic FROM postbox.subscription b WHERE b.id = of_subscription) AND s.base <= of_offset
    ORDER BY s.base DESC LIMIT 1;
    INSERT INTO postbox.redelivery (subscription_id, "offset", lane, state, attempt, due_at, seq, id, published_at, type, key, key_hash, headers,
        content_type, payload)
    SELECT of_subscription, of_offset, of_lane, 'retry', 0, postbox.clock(), o.seq, o.id, o.published_at, o.type, o.key, place.key_hash,
        o.headers, o.content_type, o.payload
    FROM postbox.outbox o WHERE o.slot = place.slot AND o.xid = place.xid AND o.seq = place.seq
    ON CONFLICT (subscription_id, "offset") DO NOTHING;
EXCEPTION WHEN OTHERS THEN
    -- The row itself is damaged. What is known of it must do: where it is.
    INSERT INTO postbox.redelivery (subscription_id, "offset", lane, state, attempt, due_at, seq, id, published_at, key_hash, headers, payload)
    VALUES (of_subscription, of_offset, of_lane, 'retry', 0, postbox.clock(), place.seq, postbox.uuid7(), postbox.clock(), place.key_hash,
        jsonb_build_object('postbox-not-copied', SQLERRM), '')
    ON CONFLICT (subscription_id, "offset") DO NOTHING;
END $$;
COMMENT ON FUNCTION postbox.copy_unread IS
    'Copies a message from the log to redelivery, for an owner who could not read it.';

CREATE OR REPLACE FUNCTION postbox.record(
    by_consumer integer, subscriptions integer[], lanes smallint[], epochs integer[], positions bigint[],
    pending_subscriptions integer[], pending_offsets bigint[],
    of_subscriptions integer[], of_lanes smallint[], of_epochs integer[], offsets bigint[], states text[], attempts integer[],
    waits double precision[], failures jsonb[], reasons text[],
    ids uuid[], seqs bigint[], published timestamptz[], types text[], keys text[], key_hashes integer[], headers jsonb[],
    content_types text[], payloads bytea[], expiries timestamptz[],
    cleared_subscriptions integer[], cleared_lanes smallint[], lanes_of_pending smallint[],
    parked_subscriptions integer[], parked_lanes smallint[], parked_epochs integer[], parked_keys integer[], parked_offsets bigint[],
    parked_types text[], needs_subscriptions integer[], needs_lanes smallint[], needs_epochs integer[], needs_types text[]
) RETURNS bigint
    LANGUAGE plpgsql
    SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    accepted bigint;
    instance text;
    fresh    boolean[];
    moved    bigint;
BEGIN
    PERFORM postbox.require_read_committed('postbox.record()');
    -- The fence of postbox.settle: redelivery has one truth, so a stale owner must not write it. In order, so that two calls cannot deadlock.
    PERFORM pg_advisory_xact_lock_shared(1347571762, f.n)
    FROM (SELECT DISTINCT u.subscription_id * 1024 + u.lane AS n
        FROM unnest(of_subscriptions || parked_subscriptions, of_lanes || parked_lanes) AS u (subscription_id, lane) ORDER BY 1) f;

    -- Together with the checkpoint by which the lane passes these messages: none is in both places or in neither.
    accepted := postbox.checkpoint(by_consumer, subscriptions, lanes, epochs, positions, pending_subscriptions, pending_offsets,
        lanes_of_pending);

    SELECT c.name INTO instance FROM postbox.consumer c WHERE c.id = by_consumer;
    SELECT array_agg(l.lane IS NOT NULL ORDER BY u.n) INTO fresh
    FROM unnest(of_subscriptions, of_lanes, of_epochs) WITH ORDINALITY AS u (subscription_id, lane, epoch, n)
    LEFT JOIN postbox.lane l ON l.subscription_id = u.subscription_id AND l.lane = u.lane AND l.epoch = u.epoch
        AND l.consumer_id = by_consumer;

    INSERT INTO postbox.redelivery AS r (subscription_id, "offset", lane, state, attempt, due_at, failed_at, errors, seq, id,
        published_at, type, key, key_hash, headers, content_type, payload, expires_at)
    SELECT u.subscription_id, u."offset", u.lane, CASE u.state WHEN 'dead' THEN 'retry' ELSE u.state END, u.attempt,
        postbox.clock() + make_interval(secs => u.wait), CASE WHEN u.errors <> '[]' THEN postbox.clock() END, u.errors, u.seq, u.id,
        u.published_at, u.type, u.key, u.key_hash, u.headers, u.content_type, u.payload, u.expires_at
    FROM unnest(of_subscriptions, of_lanes, offsets, states, attempts, waits, failures, ids, seqs, published, types, keys, key_hashes,
            headers, content_types, payloads, expiries, fresh)
        AS u (subscription_id, lane, "offset", state, attempt, wait, errors, id, seq, published_at, type, key, key_hash, headers,
            content_type, payload, expires_at, fresh)
    WHERE u.fresh AND u.id IS NOT NULL AND u.state <> 'done'
    ON CONFLICT (subscription_id, "offset") DO UPDATE
    SET state = excluded.state, attempt = excluded.attempt, due_at = excluded.due_at, noted_at = excluded.noted_at,
        failed_at = coalesce(r.failed_at, excluded.failed_at),
        errors = jsonb_path_query_array(r.errors || excluded.errors, '$[last - 19 to last]');

    PERFORM postbox.copy_unread(u.subscription_id, u.lane, u."offset")
    FROM unnest(of_subscriptions, of_lanes, offsets, ids, seqs, fresh) AS u (subscription_id, lane, "offset", id, seq, fresh)
    WHERE u.fresh AND u.id IS NULL AND u.seq IS NOT NULL;

    UPDATE postbox.redelivery r
    SET state = CASE WHEN u.state = 'dead' THEN r.state ELSE u.state END, attempt = u.attempt,
        due_at = postbox.clock() + make_interval(secs => u.wait), noted_at = postbox.clock(),
        failed_at = coalesce(r.failed_at, CASE WHEN u.errors <> '[]' THEN postbox.clock() END),
        errors = jsonb_path_query_array(r.errors || u.errors, '$[last - 19 to last]')
    FROM unnest(of_subscriptions, offsets, states, attempts, waits, failures, ids, fresh)
        AS u (subscription_id, "offset", state, attempt, wait, errors, id, fresh)
    WHERE u.fresh AND u.id IS NULL AND u.state <> 'done' AND r.subscription_id = u.subscription_id AND r."offset" = u."offset";

    INSERT INTO postbox.dead_letter AS d (subscription_id, "offset", lane, reason, halted, attempts, errors, instance, seq, message_id,
        published_at, type, key, key_hash, headers, content_type, payload)
    SELECT r.subscription_id, r."offset", r.lane, u.reason, u.state = 'halted', r.attempt, r.errors, instance, r.seq, r.id,
        r.published_at, r.type, r.key, r.key_hash, r.headers, r.content_type, r.payload
    FROM unnest(of_subscriptions, offsets, states, reasons, fresh) AS u (subscription_id, "offset", state, reason, fresh)
    JOIN postbox.redelivery r ON r.subscription_id = u.subscription_id AND r."offset" = u."offset"
    WHERE u.fresh AND u.state IN ('dead', 'halted')
    ON CONFLICT (subscription_id, "offset") DO UPDATE
    SET reason = excluded.reason, halted = excluded.halted, attempts = excluded.attempts, errors = excluded.errors,
        instance = excluded.instance, died_at = excluded.died_at;

    DELETE FROM postbox.redelivery r
    USING unnest(of_subscriptions, offsets, states, fresh) AS u (subscription_id, "offset", state, fresh)
    WHERE u.fresh AND u.state IN ('dead', 'done') AND r.subscription_id = u.subscription_id AND r."offset" = u."offset";

    WITH parked AS (
        SELECT u.* FROM unnest(parked_subscriptions, parked_lanes, parked_epochs, parked_keys, parked_offsets, parked_types)
            AS u (subscription_id, lane, epoch, key_hash, "offset", waits_for)
        JOIN postbox.lane l ON l.subscription_id = u.subscription_id AND l.lane = u.lane AND l.epoch = u.epoch
            AND l.consumer_id = by_consumer
    ),
    caught_up AS (
        DELETE FROM postbox.parked_key k USING parked p
        WHERE p."offset" IS NULL AND k.subscription_id = p.subscription_id AND k.key_hash = p.key_hash
    ),
    behind AS (
        INSERT INTO postbox.parked_key (subscription_id, key_hash, lane, "offset", waits_for)
        SELECT p.subscription_id, p.key_hash, p.lane, p."offset", p.waits_for FROM parked p WHERE p."offset" IS NOT NULL
        ON CONFLICT (subscription_id, key_hash) DO UPDATE SET "offset" = excluded."offset", waits_for = excluded.waits_for
    )
    SELECT count(*) INTO moved FROM parked;

    -- With what waits for these types: an owner that dies leaves word of it.
    UPDATE postbox.lane l SET needs = n.types
    FROM (
        SELECT u.subscription_id, u.lane, u.epoch, coalesce(array_agg(u.type ORDER BY u.n) FILTER (WHERE u.type IS NOT NULL), '{}') AS types
        FROM unnest(needs_subscriptions, needs_lanes, needs_epochs, needs_types) WITH ORDINALITY AS u (subscription_id, lane, epoch, type, n)
        GROUP BY u.subscription_id, u.lane, u.epoch) n
    WHERE l.subscription_id = n.subscription_id AND l.lane = n.lane AND l.epoch = n.epoch AND l.consumer_id = by_consumer;

    UPDATE postbox.lane l SET crashes = 0
    FROM unnest(cleared_subscriptions, cleared_lanes) AS u (subscription_id, lane)
    WHERE l.subscription_id = u.subscription_id AND l.lane = u.lane AND l.consumer_id = by_consumer;

    RETURN accepted + moved + (SELECT count(*) FROM unnest(fresh) AS f WHERE f);
END $$;
COMMENT ON FUNCTION postbox.record IS
    'A checkpoint with what became of messages that it passes without success, in one transaction. A state is one of redelivery''s, or done (settled now), or dead (to the dead letters); a null id means that the row is there, or, with a seq, that it is to be copied from the log, because its owner could not read it. A parked key without an offset has caught up. What a lane needs is a row a type, in order; one of null: nothing. What comes from a stale epoch is left out. Returns how many lanes, messages and parked keys were accepted.';

CREATE OR REPLACE FUNCTION postbox.publish_dead_letters() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO postbox.outbox (topic, type, key, headers, content_type, payload)
    SELECT 'dead/' || s.group_name, l.type, l.key,
        -- What the publisher said gives way to why it is here.
        CASE WHEN octet_length(coalesce(l.headers::text, '')) <= 12288 THEN coalesce(l.headers, '{}') ELSE '{}' END
            || jsonb_build_object('postbox-dead-group', s.group_name, 'postbox-dead-topic', s.topic, 'postbox-dead-id', l.message_id::text,
                'postbox-dead-offset', l."offset"::text, 'postbox-dead-attempts', l.attempts::text, 'postbox-dead-reason', left(l.reason, 500),
                'postbox-dead-halted', l.halted::text,
                'postbox-dead-published-at', to_char(l.published_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')),
        l.content_type, l.payload
    FROM letters l JOIN postbox.subscription s ON s.id = l.subscription_id
    WHERE NOT starts_with(s.topic, 'dead/')
        AND EXISTS (SELECT FROM postbox.subscription h WHERE h.topic = 'dead/' || s.group_name)
    ORDER BY l.id;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION postbox.publish_dead_letters IS
    'Publishes what a group gave up to those who handle its dead letters, in the same transaction. What they give up is not published again.';
CREATE OR REPLACE TRIGGER publish_dead_letters AFTER INSERT ON postbox.dead_letter REFERENCING NEW TABLE AS letters FOR EACH STATEMENT
    EXECUTE FUNCTION postbox.publish_dead_letters();
COMMENT ON TRIGGER publish_dead_letters ON postbox.dead_letter IS 'For handlers of dead letters.';

CREATE OR REPLACE FUNCTION postbox.redrive(letters bigint[], new_payload bytea DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    redriven bigint;
BEGIN
    WITH gone AS (DELETE FROM postbox.dead_letter d WHERE d.id = ANY (letters) RETURNING d.*),
    edited AS (
        INSERT INTO postbox.edit AS e (subscription_id, "offset", payload)
        SELECT g.subscription_id, g."offset", new_payload FROM gone g WHERE new_payload IS NOT NULL
        ON CONFLICT (subscription_id, "offset") DO UPDATE SET payload = excluded.payload, edited_at = excluded.edited_at
    ),
    back AS (
        INSERT INTO postbox.redelivery AS r (subscription_id, "offset", lane, state, attempt, due_at, errors, seq, id, published_at,
            type, key, key_hash, headers, content_type, payload)
        SELECT g.subscription_id, g."offset", g.lane, 'redriven', 0, postbox.clock(), g.errors, g.seq, g.message_id, g.published_at,
            g.type, g.key, g.key_hash,
            coalesce(g.headers, '{}') || jsonb_build_object('postbox-redriven',
                (CASE WHEN g.headers ->> 'postbox-redriven' ~ '^[0-9]{1,8}$' THEN (g.headers ->> 'postbox-redriven')::integer ELSE 0 END + 1)::text),
            g.content_type, coalesce(new_payload, g.payload)
        FROM gone g
        -- A halted one is still there.
        ON CONFLICT (subscription_id, "offset") DO UPDATE
        SET state = 'redriven', attempt = 0, due_at = excluded.due_at, noted_at = excluded.noted_at, failed_at = NULL, expires_at = NULL, headers = excluded.headers, payload = excluded.payload
        RETURNING 1
    )
    SELECT count(*) INTO redriven FROM back;
    RETURN redriven;
END $$;
COMMENT ON FUNCTION postbox.redrive IS
    'Puts dead letters back to be run again, with their ids and a header postbox-redriven that counts; a new payload may be given for one that cannot be handled as it is, and stays for a replay. Returns how many.';

CREATE OR REPLACE FUNCTION postbox.discard(letters bigint[]) RETURNS bigint
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    discarded bigint;
BEGIN
    WITH gone AS (DELETE FROM postbox.dead_letter d WHERE d.id = ANY (letters) RETURNING d.*),
    released AS (
        UPDATE postbox.redelivery r SET state = 'released' FROM gone g
        WHERE g.halted AND r.subscription_id = g.subscription_id AND r."offset" = g."offset" AND r.state = 'halted'
    )
    SELECT count(*) INTO discarded FROM gone;
    RETURN discarded;
END $$;
COMMENT ON FUNCTION postbox.discard IS 'Deletes dead letters for good; the key of a halted one goes on. Returns how many.';

CREATE OR REPLACE FUNCTION postbox.release_key(letters bigint[]) RETURNS bigint
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    released bigint;
BEGIN
    WITH let AS (UPDATE postbox.dead_letter d SET halted = false WHERE d.id = ANY (letters) AND d.halted RETURNING d.*),
    freed AS (
        UPDATE postbox.redelivery r SET state = 'released' FROM let l
        WHERE r.subscription_id = l.subscription_id AND r."offset" = l."offset" AND r.state = 'halted'
    )
    SELECT count(*) INTO released FROM let;
    RETURN released;
END $$;
COMMENT ON FUNCTION postbox.release_key IS 'Lets the keys of halted dead letters go on; the letters stay. Returns how many.';
