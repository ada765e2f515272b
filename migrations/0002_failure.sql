-- Failure: what became of messages that could not be handled at once. The exception path: these are the only rows of the consuming side that
-- are updated and deleted. See ARCHITECTURE.md, "Failure".

CREATE TABLE postbox.redelivery (
    subscription_id integer     NOT NULL REFERENCES postbox.subscription ON DELETE CASCADE,
    "offset"        bigint      NOT NULL,
    lane            smallint    NOT NULL,
    state           text        NOT NULL CHECK (state IN ('retry', 'parked', 'trying', 'halted', 'redriven', 'released')),
    attempt         integer     NOT NULL,
    due_at          timestamptz NOT NULL,
    failed_at       timestamptz,
    errors          jsonb       NOT NULL DEFAULT '[]',
    seq             bigint      NOT NULL,
    id              uuid        NOT NULL,
    published_at    timestamptz NOT NULL,
    type            text,
    key             text,
    key_hash        integer,
    headers         jsonb,
    content_type    text,
    payload         bytea       NOT NULL,
    expires_at      timestamptz,
    created_at      timestamptz NOT NULL DEFAULT postbox.clock(),
    PRIMARY KEY (subscription_id, "offset")
);
COMMENT ON TABLE postbox.redelivery IS
    'One row is a message of a subscription that its lane has passed without success: it waits for its next attempt, for its predecessor of the same key, or for an operator. Written by the lane''s owner, together with its checkpoint, and by operators; deleted when the message is settled.';
COMMENT ON COLUMN postbox.redelivery.subscription_id IS 'Subscription.';
COMMENT ON COLUMN postbox.redelivery."offset" IS 'Its offset in the topic, by which successors of a key are ordered.';
COMMENT ON COLUMN postbox.redelivery.lane IS 'Its lane: who owns it runs the message.';
COMMENT ON COLUMN postbox.redelivery.state IS
    'retry: waits for due_at, and its key for it. parked: waits for its predecessors, and its slot was truncated meanwhile (else see postbox.parked_key). trying: an attempt that was recorded before it ran, because a process may die of it. halted: attempts exhausted, its key waits for an operator. redriven: an operator wants it run again. released: an operator lets its key go on.';
COMMENT ON COLUMN postbox.redelivery.attempt IS 'Attempts made; 0: none.';
COMMENT ON COLUMN postbox.redelivery.due_at IS 'When the next attempt is due.';
COMMENT ON COLUMN postbox.redelivery.failed_at IS 'When it first failed; null: it has not yet.';
COMMENT ON COLUMN postbox.redelivery.errors IS 'The last twenty failures: attempt, at, error, instance.';
COMMENT ON COLUMN postbox.redelivery.seq IS 'outbox.seq.';
COMMENT ON COLUMN postbox.redelivery.id IS 'Message id.';
COMMENT ON COLUMN postbox.redelivery.published_at IS 'As in the outbox.';
COMMENT ON COLUMN postbox.redelivery.type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.redelivery.key IS 'As in the outbox.';
COMMENT ON COLUMN postbox.redelivery.key_hash IS 'postbox.key_hash of its key.';
COMMENT ON COLUMN postbox.redelivery.headers IS 'As in the outbox.';
COMMENT ON COLUMN postbox.redelivery.content_type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.redelivery.payload IS 'A copy, so that it outlives its slot.';
COMMENT ON COLUMN postbox.redelivery.expires_at IS 'As in the outbox. What an operator redrives does not expire.';
COMMENT ON COLUMN postbox.redelivery.created_at IS 'When it first failed, or was copied.';

CREATE INDEX redelivery_key ON postbox.redelivery (subscription_id, key_hash, "offset");
CREATE INDEX redelivery_operator ON postbox.redelivery (subscription_id) WHERE state IN ('redriven', 'released');

CREATE TABLE postbox.parked_key (
    subscription_id integer  NOT NULL REFERENCES postbox.subscription ON DELETE CASCADE,
    key_hash        integer  NOT NULL,
    lane            smallint NOT NULL,
    "offset"        bigint   NOT NULL,
    PRIMARY KEY (subscription_id, key_hash)
) WITH (fillfactor = 50);
COMMENT ON TABLE postbox.parked_key IS
    'One row is a key that its lane leaves behind: its messages from this offset on are parked, in the log, until those before them are settled. Written by the lane''s owner, together with its checkpoint; deleted when the key has caught up with its lane.';
COMMENT ON COLUMN postbox.parked_key.subscription_id IS 'Subscription.';
COMMENT ON COLUMN postbox.parked_key.key_hash IS 'postbox.key_hash of the key.';
COMMENT ON COLUMN postbox.parked_key.lane IS 'Its lane.';
COMMENT ON COLUMN postbox.parked_key."offset" IS 'From here on, whatever the lane''s position, none of the key''s messages is settled or pending.';

CREATE TABLE postbox.dead_letter (
    id              bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    subscription_id integer     NOT NULL REFERENCES postbox.subscription ON DELETE CASCADE,
    "offset"        bigint      NOT NULL,
    lane            smallint    NOT NULL,
    reason          text        NOT NULL,
    halted          boolean     NOT NULL DEFAULT false,
    attempts        integer     NOT NULL,
    errors          jsonb       NOT NULL,
    instance        text,
    died_at         timestamptz NOT NULL DEFAULT postbox.clock(),
    seq             bigint      NOT NULL,
    message_id      uuid        NOT NULL,
    published_at    timestamptz NOT NULL,
    type            text,
    key             text,
    key_hash        integer,
    headers         jsonb,
    content_type    text,
    payload         bytea       NOT NULL,
    UNIQUE (subscription_id, "offset")
);
COMMENT ON TABLE postbox.dead_letter IS
    'One row is a message that a subscription has given up, whole, with the history of its errors. Written by the lane''s owner; redriven or discarded by operators.';
COMMENT ON COLUMN postbox.dead_letter.id IS 'Dead letter.';
COMMENT ON COLUMN postbox.dead_letter.subscription_id IS 'Subscription that gave it up.';
COMMENT ON COLUMN postbox.dead_letter."offset" IS 'Its offset in the topic.';
COMMENT ON COLUMN postbox.dead_letter.lane IS 'Its lane.';
COMMENT ON COLUMN postbox.dead_letter.reason IS 'Why it was given up, in words.';
COMMENT ON COLUMN postbox.dead_letter.halted IS 'Whether its key waits for an operator.';
COMMENT ON COLUMN postbox.dead_letter.attempts IS 'Attempts made.';
COMMENT ON COLUMN postbox.dead_letter.errors IS 'The last twenty failures: attempt, at, error, instance.';
COMMENT ON COLUMN postbox.dead_letter.instance IS 'Instance that gave it up.';
COMMENT ON COLUMN postbox.dead_letter.died_at IS 'When it was given up.';
COMMENT ON COLUMN postbox.dead_letter.seq IS 'outbox.seq.';
COMMENT ON COLUMN postbox.dead_letter.message_id IS 'Message id.';
COMMENT ON COLUMN postbox.dead_letter.published_at IS 'As in the outbox.';
COMMENT ON COLUMN postbox.dead_letter.type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.dead_letter.key IS 'As in the outbox.';
COMMENT ON COLUMN postbox.dead_letter.key_hash IS 'postbox.key_hash of its key.';
COMMENT ON COLUMN postbox.dead_letter.headers IS 'As in the outbox.';
COMMENT ON COLUMN postbox.dead_letter.content_type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.dead_letter.payload IS 'The message itself.';

CREATE INDEX dead_letter_message ON postbox.dead_letter (message_id);
CREATE INDEX dead_letter_newest ON postbox.dead_letter (subscription_id, id);

ALTER TABLE postbox.lane ADD COLUMN crashes integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN postbox.lane.crashes IS
    'How many owners in a row died before the lane got past what they were doing; from the second on its messages are tried one by one.';

------------------------------------------------------------------------------------------------------------------- the owner's side

CREATE FUNCTION postbox.claim(
    by_consumer integer, of_subscription integer, wanted smallint[], seen_epochs integer[], owners_died boolean[]
)
    RETURNS TABLE (lane smallint, epoch integer, "position" bigint, pending bigint[], done bigint[], crashes integer)
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    w       record;
    state   record;
    settled bigint[];
    died    integer;
BEGIN
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
            crashes = l.crashes + w.died::integer, changed_at = clock_timestamp()
        WHERE l.subscription_id = of_subscription AND l.lane = w.lane
        RETURNING l.crashes INTO died;
        RETURN QUERY SELECT w.lane, w.epoch + 1, state.position, state.pending, settled, died;
    END LOOP;
END $$;
COMMENT ON FUNCTION postbox.claim IS
    'Makes a consumer the owner of those lanes that still have the epoch it saw, and says where each stands: done are offsets settled by transactional handlers beyond position or in pending. owners_died: whether the last owner is dead, not gone in order.';

CREATE FUNCTION postbox.record(
    by_consumer integer, subscriptions integer[], lanes smallint[], epochs integer[], positions bigint[],
    pending_subscriptions integer[], pending_offsets bigint[],
    of_subscriptions integer[], of_lanes smallint[], of_epochs integer[], offsets bigint[], states text[], attempts integer[],
    waits double precision[], failures jsonb[], reasons text[],
    ids uuid[], seqs bigint[], published timestamptz[], types text[], keys text[], key_hashes integer[], headers jsonb[],
    content_types text[], payloads bytea[], expiries timestamptz[],
    calm_subscriptions integer[], calm_lanes smallint[], lanes_of_pending smallint[],
    parked_subscriptions integer[], parked_lanes smallint[], parked_epochs integer[], parked_keys integer[], parked_offsets bigint[]
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
    SET state = excluded.state, attempt = excluded.attempt, due_at = excluded.due_at,
        failed_at = coalesce(r.failed_at, excluded.failed_at),
        errors = jsonb_path_query_array(r.errors || excluded.errors, '$[last - 19 to last]');

    UPDATE postbox.redelivery r
    SET state = CASE WHEN u.state = 'dead' THEN r.state ELSE u.state END, attempt = u.attempt,
        due_at = postbox.clock() + make_interval(secs => u.wait),
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
        SELECT u.* FROM unnest(parked_subscriptions, parked_lanes, parked_epochs, parked_keys, parked_offsets)
            AS u (subscription_id, lane, epoch, key_hash, "offset")
        JOIN postbox.lane l ON l.subscription_id = u.subscription_id AND l.lane = u.lane AND l.epoch = u.epoch
            AND l.consumer_id = by_consumer
    ),
    caught_up AS (
        DELETE FROM postbox.parked_key k USING parked p
        WHERE p."offset" IS NULL AND k.subscription_id = p.subscription_id AND k.key_hash = p.key_hash
    ),
    behind AS (
        INSERT INTO postbox.parked_key (subscription_id, key_hash, lane, "offset")
        SELECT p.subscription_id, p.key_hash, p.lane, p."offset" FROM parked p WHERE p."offset" IS NOT NULL
        ON CONFLICT (subscription_id, key_hash) DO UPDATE SET "offset" = excluded."offset"
    )
    SELECT count(*) INTO moved FROM parked;

    UPDATE postbox.lane l SET crashes = 0
    FROM unnest(calm_subscriptions, calm_lanes) AS u (subscription_id, lane)
    WHERE l.subscription_id = u.subscription_id AND l.lane = u.lane AND l.consumer_id = by_consumer;

    RETURN accepted + moved + (SELECT count(*) FROM unnest(fresh) AS f WHERE f);
END $$;
COMMENT ON FUNCTION postbox.record IS
    'A checkpoint with what became of messages that it passes without success, in one transaction. A state is one of redelivery''s, or done (settled now), or dead (to the dead letters); a null id means that the row is there. A parked key without an offset has caught up. What comes from a stale epoch is left out. Returns how many lanes, messages and parked keys were accepted.';

CREATE FUNCTION postbox.release(
    by_consumer integer, of_subscription integer, lanes smallint[], epochs integer[], positions bigint[], still_pending bigint[],
    lanes_of_pending smallint[] DEFAULT NULL
) RETURNS void
    LANGUAGE sql VOLATILE AS $$
    UPDATE postbox.lane l
    SET consumer_id = NULL, position = r.position, crashes = 0,
        pending = CASE WHEN lanes_of_pending IS NULL THEN still_pending
            ELSE ARRAY(SELECT p."offset" FROM unnest(still_pending, lanes_of_pending) AS p ("offset", lane) WHERE p.lane = r.lane) END, changed_at = clock_timestamp()
    FROM unnest(lanes, epochs, positions) AS r (lane, epoch, position)
    WHERE l.subscription_id = of_subscription AND l.lane = r.lane AND l.epoch = r.epoch AND l.consumer_id = by_consumer
$$;
COMMENT ON FUNCTION postbox.release IS 'Frees lanes that a consumer owns, with where they stand.';

--------------------------------------------------------------------------------------------------------------- the operator's side

CREATE FUNCTION postbox.redrive(letters bigint[], new_payload bytea DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    redriven bigint;
BEGIN
    WITH gone AS (DELETE FROM postbox.dead_letter d WHERE d.id = ANY (letters) RETURNING d.*),
    back AS (
        INSERT INTO postbox.redelivery AS r (subscription_id, "offset", lane, state, attempt, due_at, errors, seq, id, published_at,
            type, key, key_hash, headers, content_type, payload)
        SELECT g.subscription_id, g."offset", g.lane, 'redriven', 0, postbox.clock(), g.errors, g.seq, g.message_id, g.published_at,
            g.type, g.key, g.key_hash,
            coalesce(g.headers, '{}') || jsonb_build_object('postbox-redriven',
                (coalesce((g.headers ->> 'postbox-redriven')::integer, 0) + 1)::text),
            g.content_type, coalesce(new_payload, g.payload)
        FROM gone g
        -- A halted one is still there.
        ON CONFLICT (subscription_id, "offset") DO UPDATE
        SET state = 'redriven', attempt = 0, due_at = excluded.due_at, failed_at = NULL, expires_at = NULL, headers = excluded.headers, payload = excluded.payload
        RETURNING 1
    )
    SELECT count(*) INTO redriven FROM back;
    RETURN redriven;
END $$;
COMMENT ON FUNCTION postbox.redrive IS
    'Puts dead letters back to be run again, with their ids and a header postbox-redriven that counts; a new payload may be given for one that cannot be handled as it is. Returns how many.';

CREATE FUNCTION postbox.discard(letters bigint[]) RETURNS bigint
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

CREATE FUNCTION postbox.release_key(letters bigint[]) RETURNS bigint
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
