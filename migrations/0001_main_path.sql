-- The main path: publish, sequence, consume.
--
-- Everything that is written per message or per batch is append-only and lives in a ring of eight partitions ("slots") that are
-- truncated whole; see ARCHITECTURE.md, "The ring".

COMMENT ON SCHEMA postbox IS
    'Postbox: transactional outbox and messaging. Publish with postbox.publish() or INSERT INTO postbox.outbox; everything else belongs to Postbox.';

-- Advisory locks. The two-integer space (class, object) is used with these classes; nothing else in the database may use them.
--   1347571761, 1: the sequencer; 2: the dispatcher's bell; 3: the consumers' bell; 4: migrations; 5: the timers' bell; 6: promotion;
--     7: truncation
--   1347571762, subscription * 1024 + lane: the fence of a lane
--   1347571763, consumer id: held by a consumer's session for as long as it lives
--   1347571764, hash of topic and key: ordered publishing
--   1347571766, 1: postbox bench
--   1347571767, tenths of a second: held shared by a consumer's session, when it said last that it is alive

---------------------------------------------------------------------------------------------------------------- time and ids

CREATE FUNCTION postbox.clock() RETURNS timestamptz
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN clock_timestamp();
COMMENT ON FUNCTION postbox.clock IS
    'The time by which messages are published, due, expired and retained. A function of its own so that a test can move it; it is inlined, so it costs nothing. Leases and heartbeats go by the real clock.';

CREATE FUNCTION postbox.slot_of(at timestamptz) RETURNS smallint
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN ((date_part('epoch', at)::bigint / 43200) % 8)::smallint;
COMMENT ON FUNCTION postbox.slot_of IS
    'The ring slot of an instant: eight slots of twelve hours, so that a slot comes round again after four days.';

CREATE FUNCTION postbox.uuid7() RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        PLACING substring(int8send((extract(epoch FROM postbox.clock()) * 1000)::bigint) FROM 3) FROM 1 FOR 6),
        52, 1), 53, 1), 'hex')::uuid;
COMMENT ON FUNCTION postbox.uuid7 IS 'A UUID version 7 (RFC 9562): 48 bits of Unix milliseconds, then random.';

------------------------------------------------------------------------------------------------------------------- the outbox

CREATE SEQUENCE postbox.outbox_seq AS bigint CACHE 1;
COMMENT ON SEQUENCE postbox.outbox_seq IS
    'Insertion order over all topics. CACHE 1, so that a row inserted after another one''s commit has a greater number.';

CREATE FUNCTION postbox.ring_bell() RETURNS bigint
    LANGUAGE plpgsql AS $$
BEGIN
    -- A transaction that has notified cannot be prepared, so one that will be says so and is found by the slow poll.
    IF current_setting('postbox.two_phase', true) IS DISTINCT FROM 'on' THEN
        PERFORM pg_notify('postbox_outbox', '');
    END IF;
    RETURN nextval('postbox.outbox_seq');
END $$;
COMMENT ON FUNCTION postbox.ring_bell IS 'Wakes the dispatcher; returns the seq of the message for which it does.';

CREATE FUNCTION postbox.check_message(topic text, type text, key text, headers jsonb, content_type text) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF (topic IS NULL OR (octet_length(topic) BETWEEN 1 AND 255 AND topic !~ '[^A-Za-z0-9._:/-]'))
        AND (type IS NULL OR (octet_length(type) BETWEEN 1 AND 255 AND type !~ '[^A-Za-z0-9._:/-]'))
        AND (key IS NULL OR octet_length(key) <= 1024)
        AND (headers IS NULL OR (jsonb_typeof(headers) = 'object' AND octet_length(headers::text) <= 16384))
        AND (content_type IS NULL OR octet_length(content_type) BETWEEN 1 AND 255)
    THEN
        RETURN true;
    END IF;
    RAISE check_violation USING
        MESSAGE = CASE
            WHEN octet_length(topic) BETWEEN 1 AND 255 AND topic !~ '[^A-Za-z0-9._:/-]' THEN CASE
                WHEN NOT (octet_length(type) BETWEEN 1 AND 255 AND type !~ '[^A-Za-z0-9._:/-]') THEN format(
                    'type %L is not allowed: a message type is 1 to 255 characters of A-Z a-z 0-9 . _ - : /', left(type, 300))
                WHEN octet_length(key) > 1024 THEN format(
                    'the key has %s bytes: a key has at most 1,024 bytes, so use a digest of it as the key', octet_length(key))
                WHEN jsonb_typeof(headers) <> 'object' THEN format(
                    'the headers are a JSON %s: they are an object of names and values', jsonb_typeof(headers))
                WHEN octet_length(headers::text) > 16384 THEN format(
                    'the headers have %s bytes as JSON: at most 16,384 are allowed, so move large values into the payload',
                    octet_length(headers::text))
                ELSE format('content type %L is not allowed: it has 1 to 255 bytes', left(content_type, 300))
            END
            ELSE format('topic %L is not allowed: a topic is 1 to 255 characters of A-Z a-z 0-9 . _ - : /', left(topic, 300))
        END;
END $$;
COMMENT ON FUNCTION postbox.check_message IS 'True if a message keeps the limits; otherwise an error that names the field and its limit.';

-- It has no CHECK constraints and no triggers: PostgreSQL parses and plans them anew for every INSERT, which costs a publisher more than all
-- else that Postbox does. A default is part of the plan. So it is the default of seq that tries the bell: shared, and held until the commit
-- is visible. A dispatcher can only fall asleep (take it exclusively) when nobody who found it awake is still in flight. See ARCHITECTURE.md, "The bell".
CREATE TABLE postbox.outbox (
    slot         smallint    NOT NULL DEFAULT postbox.slot_of(postbox.clock()),
    xid          xid8        NOT NULL DEFAULT pg_current_xact_id(),
    seq          bigint      NOT NULL DEFAULT CASE WHEN pg_try_advisory_xact_lock_shared(1347571761, 2)
                                 THEN nextval('postbox.outbox_seq') ELSE postbox.ring_bell() END,
    id           uuid        NOT NULL DEFAULT postbox.uuid7(),
    published_at timestamptz NOT NULL DEFAULT postbox.clock(),
    topic        text        NOT NULL,
    type         text,
    key          text,
    headers      jsonb,
    content_type text,
    payload      bytea       NOT NULL,
    expires_at   timestamptz
) PARTITION BY LIST (slot);

COMMENT ON TABLE postbox.outbox IS
    'One row is a message as it was published, in the publisher''s transaction. Written by producers, never updated or deleted: slots are truncated whole.';
COMMENT ON COLUMN postbox.outbox.slot IS 'Ring slot, from the clock at insertion. Not for producers to write.';
COMMENT ON COLUMN postbox.outbox.xid IS 'The top-level transaction, so savepoints and two-phase commits are covered. Not for producers to write.';
COMMENT ON COLUMN postbox.outbox.seq IS
    'Insertion order over all topics. Its default wakes the dispatcher if it sleeps. Not for producers to write.';
COMMENT ON COLUMN postbox.outbox.id IS 'Message id (UUID v7).';
COMMENT ON COLUMN postbox.outbox.published_at IS 'When the row was inserted.';
COMMENT ON COLUMN postbox.outbox.topic IS 'Topic: 1 to 255 characters of A-Z a-z 0-9 . _ - : /';
COMMENT ON COLUMN postbox.outbox.type IS 'Message type, which chooses the handler within a group; alphabet and length of a topic. Null: untyped.';
COMMENT ON COLUMN postbox.outbox.key IS 'Ordering key, up to 1,024 bytes: messages of one key are handled in order. Null: no order.';
COMMENT ON COLUMN postbox.outbox.headers IS 'A JSON object of strings, up to 16,384 bytes. Null: none.';
COMMENT ON COLUMN postbox.outbox.content_type IS 'Media type of the payload. Null: application/json.';
COMMENT ON COLUMN postbox.outbox.payload IS 'The message itself.';
COMMENT ON COLUMN postbox.outbox.expires_at IS 'From then on it is no longer handled. Null: never.';

------------------------------------------------------------------------------------------------------------- what orders it

CREATE TABLE postbox.topic (
    name        text PRIMARY KEY,
    next_offset bigint      NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT postbox.clock()
);
COMMENT ON TABLE postbox.topic IS 'One row is a topic that has had a message. Written by the sequencer, once a topic.';
COMMENT ON COLUMN postbox.topic.name IS 'Topic.';
COMMENT ON COLUMN postbox.topic.next_offset IS
    'Offsets never restart: the least next offset when no segment of the topic is left. Carried forward before a slot is truncated.';
COMMENT ON COLUMN postbox.topic.created_at IS 'When the sequencer first saw the topic.';

CREATE TABLE postbox.segment (
    slot         smallint    NOT NULL,
    topic        text        NOT NULL,
    base         bigint      NOT NULL,
    count        integer     NOT NULL,
    bytes        bigint      NOT NULL,
    xids         xid8[]      NOT NULL,
    seqs         bigint[]    NOT NULL,
    keys         integer[],
    sequenced_at timestamptz NOT NULL DEFAULT postbox.clock()
) PARTITION BY LIST (slot);
COMMENT ON TABLE postbox.segment IS
    'One row is up to 1,024 consecutive offsets of a topic: where their messages are, and the hashes of their keys. Written by the sequencer, never updated; same ring as the outbox.';
COMMENT ON COLUMN postbox.segment.slot IS 'Ring slot of its messages; all of a segment are in one slot.';
COMMENT ON COLUMN postbox.segment.topic IS 'Topic.';
COMMENT ON COLUMN postbox.segment.base IS 'Offset of the first message.';
COMMENT ON COLUMN postbox.segment.count IS 'Number of messages: their offsets are base to base + count - 1.';
COMMENT ON COLUMN postbox.segment.bytes IS 'Sum of the payload lengths.';
COMMENT ON COLUMN postbox.segment.xids IS 'outbox.xid of each message.';
COMMENT ON COLUMN postbox.segment.seqs IS 'outbox.seq of each message, ascending.';
COMMENT ON COLUMN postbox.segment.keys IS 'Hash of each message''s key (postbox.key_hash); an element is null where the message has no key, and the array is null where none has.';
COMMENT ON COLUMN postbox.segment.sequenced_at IS 'When the sequencer appended it.';

CREATE TABLE postbox.tick (
    slot     smallint    NOT NULL DEFAULT postbox.slot_of(postbox.clock()),
    id       bigint      NOT NULL,
    snapshot pg_snapshot NOT NULL,
    at       timestamptz NOT NULL DEFAULT postbox.clock()
) PARTITION BY LIST (slot);
COMMENT ON TABLE postbox.tick IS
    'One row is a step of the sequencer that found messages: all that its snapshot sees is in segments. Written by the sequencer, the newest counts; same ring as the outbox.';
COMMENT ON COLUMN postbox.tick.slot IS 'Ring slot, from the clock.';
COMMENT ON COLUMN postbox.tick.id IS 'Number of the step.';
COMMENT ON COLUMN postbox.tick.snapshot IS 'The snapshot with which the step read the outbox.';
COMMENT ON COLUMN postbox.tick.at IS 'When.';

------------------------------------------------------------------------------------------------------------- who consumes it

CREATE TABLE postbox.subscription (
    id         integer     PRIMARY KEY GENERATED ALWAYS AS IDENTITY CHECK (id < 2097152),
    group_name text        NOT NULL,
    topic      text        NOT NULL,
    lanes      smallint    NOT NULL CHECK (lanes BETWEEN 1 AND 1024),
    order_mode text        NOT NULL CHECK (order_mode IN ('key', 'topic', 'none')),
    node       text,
    created_at timestamptz NOT NULL DEFAULT postbox.clock(),
    UNIQUE (group_name, topic)
);
COMMENT ON TABLE postbox.subscription IS 'One row is a consumer group''s subscription to a topic. Written by consumers at their first start.';
COMMENT ON COLUMN postbox.subscription.id IS 'Subscription.';
COMMENT ON COLUMN postbox.subscription.group_name IS 'Consumer group.';
COMMENT ON COLUMN postbox.subscription.topic IS 'Topic.';
COMMENT ON COLUMN postbox.subscription.lanes IS 'Into how many lanes the keys are divided; fixed for its life.';
COMMENT ON COLUMN postbox.subscription.order_mode IS 'key: messages of one key in order; topic: all in order; none: no order.';
COMMENT ON COLUMN postbox.subscription.node IS 'For a durable broadcast: the node whose cursor this is.';
COMMENT ON COLUMN postbox.subscription.created_at IS 'When it was first registered.';

CREATE TABLE postbox.consumer (
    id            integer     PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    name          text        NOT NULL,
    pid           integer     NOT NULL,
    subscriptions integer[]   NOT NULL,
    lease         interval    NOT NULL,
    started_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    heartbeat_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    report        jsonb       NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50);
COMMENT ON TABLE postbox.consumer IS
    'One row is a session of a consumer instance, which holds the advisory lock (1347571763, id) while it lives. Written by the instance at its start and end, so that looking at it costs the same whoever holds the xmin horizon.';
COMMENT ON COLUMN postbox.consumer.id IS 'Instance; a new one for every session.';
COMMENT ON COLUMN postbox.consumer.name IS 'Name of the instance (host name by default).';
COMMENT ON COLUMN postbox.consumer.pid IS 'Its process id.';
COMMENT ON COLUMN postbox.consumer.subscriptions IS 'Which subscriptions it serves.';
COMMENT ON COLUMN postbox.consumer.lease IS 'How old its last heartbeat may be before others take over although its lock is still held.';
COMMENT ON COLUMN postbox.consumer.started_at IS 'When the session began; its heartbeats are counted from here.';
COMMENT ON COLUMN postbox.consumer.heartbeat_at IS 'Its last heartbeat, if that is not in postbox.heartbeat any more.';
COMMENT ON COLUMN postbox.consumer.report IS 'What it said of itself then.';

CREATE TABLE postbox.heartbeat (
    slot        smallint    NOT NULL DEFAULT postbox.slot_of(postbox.clock()),
    consumer_id integer     NOT NULL,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    report      jsonb       NOT NULL
) PARTITION BY LIST (slot);
COMMENT ON TABLE postbox.heartbeat IS
    'One row is what a consumer said of itself at a heartbeat, for postbox status. Written by consumers, never updated, the newest counts; same ring as the outbox. Whether it is alive is told by locks alone.';
COMMENT ON COLUMN postbox.heartbeat.slot IS 'Ring slot, from the clock.';
COMMENT ON COLUMN postbox.heartbeat.consumer_id IS 'Instance.';
COMMENT ON COLUMN postbox.heartbeat.at IS 'When.';
COMMENT ON COLUMN postbox.heartbeat.report IS 'Positions and failures of its subscriptions and broadcasts, counters.';

CREATE TABLE postbox.lane (
    subscription_id integer  NOT NULL REFERENCES postbox.subscription ON DELETE CASCADE,
    lane            smallint NOT NULL,
    epoch           integer  NOT NULL DEFAULT 0,
    consumer_id     integer,
    position        bigint   NOT NULL,
    pending         bigint[] NOT NULL DEFAULT '{}',
    changed_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (subscription_id, lane)
) WITH (fillfactor = 50);
COMMENT ON TABLE postbox.lane IS
    'One row is a lane of a subscription: who owns it, and where it stood when ownership last changed. Written when a lane is claimed or released.';
COMMENT ON COLUMN postbox.lane.subscription_id IS 'Subscription.';
COMMENT ON COLUMN postbox.lane.lane IS 'Lane, from 0.';
COMMENT ON COLUMN postbox.lane.epoch IS 'Raised by every claim; whatever carries an older one is refused.';
COMMENT ON COLUMN postbox.lane.consumer_id IS 'The owner; null: free.';
COMMENT ON COLUMN postbox.lane.position IS 'All the lane''s offsets below it are settled, but for those in pending.';
COMMENT ON COLUMN postbox.lane.pending IS 'Offsets below position that are not settled. One of another lane means nothing here.';
COMMENT ON COLUMN postbox.lane.changed_at IS 'When it was last claimed or released.';

CREATE SEQUENCE postbox.checkpoint_id AS bigint CACHE 1;
COMMENT ON SEQUENCE postbox.checkpoint_id IS 'Numbers the checkpoints; of a consumer''s checkpoints the greatest counts.';

CREATE TABLE postbox.checkpoint (
    slot            smallint    NOT NULL DEFAULT postbox.slot_of(postbox.clock()),
    id              bigint      NOT NULL DEFAULT nextval('postbox.checkpoint_id'),
    subscription_id integer     NOT NULL,
    consumer_id     integer     NOT NULL,
    lanes           smallint[]  NOT NULL,
    epochs          integer[]   NOT NULL,
    positions       bigint[]    NOT NULL,
    pending         bigint[]    NOT NULL,
    pending_lanes   smallint[],
    at              timestamptz NOT NULL DEFAULT postbox.clock()
) PARTITION BY LIST (slot);
COMMENT ON TABLE postbox.checkpoint IS
    'One row says how far a consumer has settled all the lanes that it owns of a subscription. Written by consumers, never updated, the newest counts; same ring as the outbox.';
COMMENT ON COLUMN postbox.checkpoint.slot IS 'Ring slot, from the clock.';
COMMENT ON COLUMN postbox.checkpoint.id IS 'Order of writing.';
COMMENT ON COLUMN postbox.checkpoint.subscription_id IS 'Subscription.';
COMMENT ON COLUMN postbox.checkpoint.consumer_id IS 'The owner of the lanes.';
COMMENT ON COLUMN postbox.checkpoint.lanes IS 'The lanes it owns.';
COMMENT ON COLUMN postbox.checkpoint.epochs IS 'The epoch under which it owns each.';
COMMENT ON COLUMN postbox.checkpoint.positions IS 'As lane.position, of each lane.';
COMMENT ON COLUMN postbox.checkpoint.pending IS 'As lane.pending, of all these lanes together.';
COMMENT ON COLUMN postbox.checkpoint.pending_lanes IS 'The lane of each of them. Null: not said.';
COMMENT ON COLUMN postbox.checkpoint.at IS 'When.';

CREATE TABLE postbox.settlement (
    slot            smallint    NOT NULL DEFAULT postbox.slot_of(postbox.clock()),
    subscription_id integer     NOT NULL,
    lane            smallint    NOT NULL,
    "offset"        bigint      NOT NULL
) PARTITION BY LIST (slot);
COMMENT ON TABLE postbox.settlement IS
    'One row is a message settled in the transaction of its handler: effect and settlement commit together. Written by postbox.settle, never updated; same ring as the outbox.';
COMMENT ON COLUMN postbox.settlement.slot IS 'Ring slot, from the clock.';
COMMENT ON COLUMN postbox.settlement.subscription_id IS 'Subscription.';
COMMENT ON COLUMN postbox.settlement.lane IS 'Lane.';
COMMENT ON COLUMN postbox.settlement."offset" IS 'The settled offset.';

CREATE TABLE postbox.dedup (
    topic      text        NOT NULL,
    dedup_key  text        NOT NULL CHECK (octet_length(dedup_key) BETWEEN 1 AND 1024),
    id         uuid        NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (topic, dedup_key)
);
CREATE INDEX dedup_expires_at ON postbox.dedup (expires_at);
COMMENT ON TABLE postbox.dedup IS
    'One row is a deduplication key that was published with: publishing with it again until it expires gives the first id. Written by postbox.publish, expired by the dispatcher.';
COMMENT ON COLUMN postbox.dedup.topic IS 'Topic; keys of different topics are independent.';
COMMENT ON COLUMN postbox.dedup.dedup_key IS 'The publisher''s deduplication key, up to 1,024 bytes.';
COMMENT ON COLUMN postbox.dedup.id IS 'Message id of the first publish.';
COMMENT ON COLUMN postbox.dedup.expires_at IS 'End of the window.';

--------------------------------------------------------------------------------------------------------------------- the ring

-- Arrays that are too long for a page are not compressed before they go elsewhere: that would be a third of the cost of a large step.
ALTER TABLE postbox.segment
    ALTER xids SET STORAGE EXTERNAL, ALTER seqs SET STORAGE EXTERNAL, ALTER keys SET STORAGE EXTERNAL;
ALTER TABLE postbox.checkpoint
    ALTER lanes SET STORAGE EXTERNAL, ALTER epochs SET STORAGE EXTERNAL, ALTER positions SET STORAGE EXTERNAL,
    ALTER pending SET STORAGE EXTERNAL, ALTER pending_lanes SET STORAGE EXTERNAL;

DO $$
BEGIN
    FOR slot IN 0..7 LOOP
        EXECUTE format('CREATE TABLE postbox.outbox_%1$s PARTITION OF postbox.outbox FOR VALUES IN (%1$s)
            WITH (autovacuum_vacuum_insert_threshold = 1000000)', slot);
        EXECUTE format('CREATE TABLE postbox.segment_%1$s PARTITION OF postbox.segment FOR VALUES IN (%1$s)', slot);
        EXECUTE format('CREATE TABLE postbox.tick_%1$s PARTITION OF postbox.tick FOR VALUES IN (%1$s)', slot);
        EXECUTE format('CREATE TABLE postbox.checkpoint_%1$s PARTITION OF postbox.checkpoint FOR VALUES IN (%1$s)', slot);
        EXECUTE format('CREATE TABLE postbox.settlement_%1$s PARTITION OF postbox.settlement FOR VALUES IN (%1$s)', slot);
        EXECUTE format('CREATE TABLE postbox.heartbeat_%1$s PARTITION OF postbox.heartbeat FOR VALUES IN (%1$s)', slot);
        EXECUTE format('COMMENT ON TABLE postbox.outbox_%1$s IS ''Slot %1$s of postbox.outbox.''', slot);
        EXECUTE format('COMMENT ON TABLE postbox.segment_%1$s IS ''Slot %1$s of postbox.segment.''', slot);
        EXECUTE format('COMMENT ON TABLE postbox.tick_%1$s IS ''Slot %1$s of postbox.tick.''', slot);
        EXECUTE format('COMMENT ON TABLE postbox.checkpoint_%1$s IS ''Slot %1$s of postbox.checkpoint.''', slot);
        EXECUTE format('COMMENT ON TABLE postbox.settlement_%1$s IS ''Slot %1$s of postbox.settlement.''', slot);
        EXECUTE format('COMMENT ON TABLE postbox.heartbeat_%1$s IS ''Slot %1$s of postbox.heartbeat.''', slot);
    END LOOP;
END $$;

-- The only index of the outbox: it finds what is new and fetches by address.
CREATE INDEX outbox_xid_seq ON postbox.outbox (xid, seq);
CREATE INDEX segment_topic_base ON postbox.segment (topic, base);
CREATE INDEX tick_newest ON postbox.tick (id);
CREATE INDEX checkpoint_newest ON postbox.checkpoint (subscription_id, consumer_id, id);
CREATE INDEX settlement_offset ON postbox.settlement (subscription_id, lane, "offset");
CREATE INDEX heartbeat_newest ON postbox.heartbeat (consumer_id, at);

-------------------------------------------------------------------------------------------------------------------- publishing

CREATE FUNCTION postbox.key_hash(key text) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (hashtextextended(key, 0) & 2147483647)::integer;
COMMENT ON FUNCTION postbox.key_hash IS
    'The hash that decides a key''s lane for ever: 31 bits of hashtextextended, which is stable across PostgreSQL versions because hash partitioning relies on it.';

CREATE FUNCTION postbox.order_hash(topic text, key text) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN hashtext(topic || ' ' || coalesce(key, ''));
COMMENT ON FUNCTION postbox.order_hash IS
    'Number of the lock of a topic and key. Whoever takes several takes them in the order of these numbers, since different keys may share one.';

CREATE FUNCTION postbox.order_lock(topic text, key text) RETURNS void
    LANGUAGE sql VOLATILE
    RETURN pg_advisory_xact_lock(1347571764, postbox.order_hash(topic, key));
COMMENT ON FUNCTION postbox.order_lock IS
    'Waits for every transaction that took it for the same topic and key, so that the order of publishing is the order of committing.';

CREATE FUNCTION postbox.publish_bytes(
    topic        text,
    payload      bytea,
    content_type text,
    key          text     DEFAULT NULL,
    type         text     DEFAULT NULL,
    headers      jsonb    DEFAULT NULL,
    dedup_key    text     DEFAULT NULL,
    dedup_window interval DEFAULT '24 hours',
    ordered      boolean  DEFAULT false,
    id           uuid     DEFAULT NULL,
    deliver_at   timestamptz DEFAULT NULL,
    delay        interval DEFAULT NULL,
    expires_at   timestamptz DEFAULT NULL,
    expires_in   interval DEFAULT NULL
) RETURNS uuid
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    message_id uuid := coalesce(publish_bytes.id, postbox.uuid7());
    due        timestamptz;
    expiry     timestamptz := publish_bytes.expires_at;
    winner     uuid;
BEGIN
    PERFORM postbox.check_message(publish_bytes.topic, publish_bytes.type, publish_bytes.key, publish_bytes.headers,
        publish_bytes.content_type);
    IF publish_bytes.ordered THEN
        PERFORM postbox.order_lock(publish_bytes.topic, publish_bytes.key);
    END IF;
    IF publish_bytes.dedup_key IS NOT NULL THEN
        INSERT INTO postbox.dedup AS d (topic, dedup_key, id, expires_at)
        VALUES (publish_bytes.topic, publish_bytes.dedup_key, message_id, postbox.clock() + publish_bytes.dedup_window)
        ON CONFLICT ON CONSTRAINT dedup_pkey DO UPDATE SET id = excluded.id, expires_at = excluded.expires_at
            WHERE d.expires_at <= postbox.clock()
        RETURNING d.id INTO winner;
        IF winner IS NULL THEN
            -- The conflicting row was locked by the insert, so it is committed and still there.
            SELECT d.id INTO winner FROM postbox.dedup d
            WHERE d.topic = publish_bytes.topic AND d.dedup_key = publish_bytes.dedup_key;
            RETURN winner;
        END IF;
    END IF;
    IF publish_bytes.deliver_at IS NOT NULL OR publish_bytes.delay IS NOT NULL THEN
        due := postbox.due_time(publish_bytes.deliver_at, publish_bytes.delay);
    END IF;
    IF publish_bytes.expires_in IS NOT NULL THEN
        expiry := least(expiry, coalesce(due, postbox.clock()) + publish_bytes.expires_in);
    END IF;
    IF due IS NOT NULL THEN
        INSERT INTO postbox.scheduled (id, deliver_at, topic, type, key, headers, content_type, payload, expires_at)
        VALUES (message_id, due, publish_bytes.topic, publish_bytes.type, publish_bytes.key,
                CASE WHEN publish_bytes.headers <> '{}' THEN publish_bytes.headers END,
                nullif(publish_bytes.content_type, 'application/json'), publish_bytes.payload, expiry);
        RETURN message_id;
    END IF;
    INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload, expires_at)
    VALUES (message_id, publish_bytes.topic, publish_bytes.type, publish_bytes.key,
            CASE WHEN publish_bytes.headers <> '{}' THEN publish_bytes.headers END,
            nullif(publish_bytes.content_type, 'application/json'), publish_bytes.payload, expiry);
    RETURN message_id;
END $$;
COMMENT ON FUNCTION postbox.publish_bytes IS
    'Publishes bytes of any content type in the caller''s transaction; returns the message id. deliver_at (an instant) or delay (a span) deliver it later, in the past means now; expires_at, or expires_in from when it is delivered, end its life.';

CREATE FUNCTION postbox.publish(
    topic        text,
    payload      jsonb,
    key          text     DEFAULT NULL,
    type         text     DEFAULT NULL,
    headers      jsonb    DEFAULT NULL,
    dedup_key    text     DEFAULT NULL,
    dedup_window interval DEFAULT '24 hours',
    ordered      boolean  DEFAULT false,
    id           uuid     DEFAULT NULL,
    deliver_at   timestamptz DEFAULT NULL,
    delay        interval DEFAULT NULL,
    expires_at   timestamptz DEFAULT NULL,
    expires_in   interval DEFAULT NULL
) RETURNS uuid
    LANGUAGE sql VOLATILE
    RETURN postbox.publish_bytes(topic, convert_to(payload::text, 'UTF8'), 'application/json', key, type, headers, dedup_key,
        dedup_window, ordered, id, deliver_at, delay, expires_at, expires_in);
COMMENT ON FUNCTION postbox.publish IS
    'Publishes a JSON message in the caller''s transaction; returns the message id. SELECT postbox.publish(topic => ''orders'', key => ''42'', payload => ''{"total": 7}'')';

CREATE FUNCTION postbox.grant_publish(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA postbox TO %s', role);
    EXECUTE format('GRANT INSERT (id, topic, type, key, headers, content_type, payload, expires_at) ON postbox.outbox TO %s', role);
    EXECUTE format('GRANT INSERT (id, deliver_at, topic, type, key, headers, content_type, payload, expires_at),
        SELECT (id), UPDATE (deliver_at, n, xid), DELETE ON postbox.scheduled TO %s', role);
    EXECUTE format('GRANT USAGE ON SEQUENCE postbox.scheduled_n TO %s', role);
    EXECUTE format('GRANT USAGE ON SEQUENCE postbox.outbox_seq TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON postbox.dedup TO %s', role);
END $$;
COMMENT ON FUNCTION postbox.grant_publish IS 'Lets a role publish, schedule and cancel, and nothing else: the content columns of the outbox, not slot, xid or seq.';

------------------------------------------------------------------------------------------------------------------ sequencing

CREATE FUNCTION postbox.next_offset(of_topic text) RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    result bigint;
BEGIN
    SELECT s.base + s.count INTO result FROM postbox.segment s WHERE s.topic = of_topic ORDER BY s.base DESC LIMIT 1;
    IF result IS NULL THEN
        SELECT t.next_offset INTO result FROM postbox.topic t WHERE t.name = of_topic;
    END IF;
    RETURN coalesce(result, 0);
END $$;
COMMENT ON FUNCTION postbox.next_offset IS 'The offset that the next message of a topic gets; the number of messages sequenced so far.';

CREATE SEQUENCE postbox.tick_id AS bigint CACHE 1;
COMMENT ON SEQUENCE postbox.tick_id IS
    'Numbers the ticks, under the sequencer''s lock: while its last value is the id of a tick that was committed, that tick is the newest.';

CREATE FUNCTION postbox.step(
    INOUT last_tick bigint, INOUT last_look pg_snapshot, INOUT last_seq bigint DEFAULT NULL, INOUT last_slot smallint DEFAULT NULL,
    INOUT last_topic text DEFAULT NULL, INOUT last_head bigint DEFAULT NULL, wanted_bytes integer DEFAULT NULL,
    OUT messages bigint, OUT topics text[], OUT heads bigint[], OUT counts bigint[], OUT news text, OUT rows postbox.outbox[]
)
    LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    look        pg_snapshot;
    last_xmax   xid8;
    last_xip    xid8[];
    latest      bigint;
    foreigner   text;
    ignored     text;
    -- The segment that is being made, in last_slot.
    topic       text;
    count       integer := 0;
    bytes       bigint := 0;
    xids        xid8[];
    seqs        bigint[];
    keys        integer[];
    first_head  bigint;
    -- The messages of its topic, and which of them are its own.
    its         record;
    low         integer;
    high        integer;
    -- The next message.
    its_xid     xid8;
    its_seq     bigint;
    its_topic   text;
    its_key     integer;
    its_bytes   integer;
    its_row     postbox.outbox[];
    its_look    pg_snapshot;
BEGIN
    messages := 0;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'postbox.sequence() must run in READ COMMITTED, not %', current_setting('transaction_isolation')
            USING HINT = 'Its snapshot must be taken after its lock.';
    END IF;
    -- A snapshot does not tell whether it sees its own transaction's rows, so the next step could not know which of them were found.
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION 'postbox.sequence() must run in a transaction of its own, before anything is written in it'
            USING HINT = 'Commit first.';
    END IF;
    -- An assignment, since a PERFORM starts a query.
    ignored := pg_advisory_xact_lock(1347571761, 1)::text;

    -- What the caller looked at last is where to go on if nobody took a step since; otherwise the newest tick is.
    IF last_look IS NULL OR last_tick IS DISTINCT FROM pg_sequence_last_value('postbox.tick_id') THEN
        -- Only here: a look that is passed back was taken in this cluster.
        foreigner := postbox.foreign_xids();
        IF foreigner IS NOT NULL THEN
            RAISE EXCEPTION 'postbox must not go on here: %', foreigner USING ERRCODE = 'PB002',
                HINT = 'The database was restored from another cluster. A dispatcher that starts puts it right by itself; by hand: postbox rebase, or SELECT * FROM postbox.rebase()';
        END IF;
        SELECT t.id, t.snapshot INTO last_tick, last_look FROM postbox.tick t ORDER BY t.id DESC LIMIT 1;
        last_seq := NULL;
        last_topic := NULL;
    END IF;
    look := pg_current_snapshot();
    IF look::text = last_look::text THEN
        -- The same transactions are finished as at the last look: nothing can be new.
        RETURN;
    END IF;
    last_xmax := coalesce(pg_snapshot_xmax(last_look), '0');

    -- Where steps are small, most of their time is starting the statement further below: a few messages of one topic and slot do without it.
    -- Every number up to last_seq is dealt with, so if those found here are all that were given since, nothing else can be new. No aggregates
    -- and no sorting: they cost more to start than a few messages in a loop. And few expressions, since each is prepared anew in every transaction.
    IF last_seq IS NOT NULL THEN
        FOR its_xid, its_seq, its_topic, its_key, its_bytes, its_row, its_look IN
            SELECT o.xid, o.seq, o.topic, postbox.key_hash(o.key), octet_length(o.payload),
                CASE WHEN octet_length(o.payload) <= wanted_bytes THEN ARRAY[o] END, pg_current_snapshot()
            FROM postbox.outbox o WHERE o.slot = last_slot AND o.xid >= last_xmax
        LOOP
            -- Then there is one more than were counted, so they are fewer than were given.
            EXIT WHEN its_seq <= coalesce(seqs[count], last_seq) OR its_topic <> topic OR count = 64;
            count := count + 1;
            topic := its_topic;
            xids[count] := its_xid;
            seqs[count] := its_seq;
            keys[count] := its_key;
            bytes := bytes + its_bytes;
            rows := rows || its_row;
        END LOOP;
        -- After the statement, whose snapshot sees no number that is given later.
        latest := pg_sequence_last_value('postbox.outbox_seq');
    END IF;
    IF count = latest - last_seq THEN
        -- Where nothing was found, the look before it will do: nothing was to be found between them.
        last_look := coalesce(its_look, look);
        last_seq := latest;
        IF count = 0 THEN
            RETURN;
        END IF;
        IF last_topic IS DISTINCT FROM topic THEN
            last_topic := topic;
            last_head := postbox.next_offset(topic);
        END IF;
        IF last_head = 0 THEN
            INSERT INTO postbox.topic (name) VALUES (topic) ON CONFLICT DO NOTHING;
        END IF;
        INSERT INTO postbox.segment (slot, topic, base, count, bytes, xids, seqs, keys)
        VALUES (last_slot, topic, last_head, count, bytes, xids, seqs, CASE WHEN array_remove(keys, NULL) <> '{}' THEN keys END);
        messages := count;
        last_head := last_head + count;
        IF cardinality(rows) < count THEN
            rows := NULL;
        END IF;
    ELSE
        last_xip := ARRAY(SELECT pg_snapshot_xip(last_look));
        latest := pg_sequence_last_value('postbox.outbox_seq');
        rows := NULL;
        -- What became visible since the last tick, by seq, not by xid: a transaction's xid may be older than its insert. The aggregates keep the
        -- order in which they are fed, which is that of their groups. The last group is none: it is there to have this statement's snapshot, for
        -- the new tick, when there is no other.
        FOR its IN
            SELECT m.topic, array_agg(m.slot) AS slots, array_agg(m.xid) AS xids, array_agg(m.seq) AS seqs, array_agg(m.key) AS keys,
                array_agg(m.bytes) AS bytes, pg_current_snapshot() AS look
            FROM (
                SELECT o.seq, o.xid, o.slot, octet_length(o.payload) AS bytes, o.topic COLLATE "C" AS topic, postbox.key_hash(o.key) AS key
                FROM postbox.outbox o WHERE o.xid >= last_xmax
                UNION ALL
                SELECT o.seq, o.xid, o.slot, octet_length(o.payload), o.topic COLLATE "C", postbox.key_hash(o.key)
                FROM postbox.outbox o WHERE o.xid = ANY (last_xip)
                UNION ALL
                SELECT NULL, NULL, NULL, NULL, NULL, NULL
                ORDER BY topic, seq) m
            GROUP BY m.topic
        LOOP
            look := its.look;
            EXIT WHEN its.topic IS NULL;
            topic := its.topic;
            first_head := postbox.next_offset(topic);
            last_head := first_head;
            IF first_head = 0 THEN
                INSERT INTO postbox.topic (name) VALUES (topic) ON CONFLICT DO NOTHING;
            END IF;
            WHILE last_head - first_head < cardinality(its.seqs) LOOP
                low := last_head - first_head + 1;
                high := least(low + 1023, cardinality(its.seqs));
                last_slot := its.slots[low];
                -- Cut where the slot changes; grouping by slot would reorder around a slot's boundary.
                IF array_remove(its.slots[low:high], last_slot) <> '{}' THEN
                    high := low;
                    WHILE its.slots[high + 1] = last_slot LOOP
                        high := high + 1;
                    END LOOP;
                END IF;
                count := high - low + 1;
                bytes := (SELECT sum(b) FROM unnest(its.bytes[low:high]) b);
                xids := its.xids[low:high];
                seqs := its.seqs[low:high];
                keys := its.keys[low:high];
                INSERT INTO postbox.segment (slot, topic, base, count, bytes, xids, seqs, keys)
                VALUES (last_slot, topic, last_head, count, bytes, xids, seqs, CASE WHEN array_remove(keys, NULL) <> '{}' THEN keys END);
                messages := messages + count;
                last_head := last_head + count;
            END LOOP;
            topics := topics || topic;
            heads := heads || last_head;
            counts := counts || last_head - first_head;
        END LOOP;
        last_look := look;
        last_topic := topic;
        last_seq := NULL;
        IF messages = 0 THEN
            RETURN;
        END IF;
        -- The first transaction that got an id after that snapshot is this one, and none with an older id was open: so none was open that had
        -- one, and it has one before its first number, since defaults are evaluated in the order of the columns.
        IF pg_current_xact_id() = pg_snapshot_xmax(look) AND pg_snapshot_xmin(look) = pg_snapshot_xmax(look) THEN
            last_seq := latest;
        END IF;
    END IF;
    last_tick := nextval('postbox.tick_id');
    INSERT INTO postbox.tick (id, snapshot) VALUES (last_tick, last_look);

    -- Every consumer that is there to be woken holds this shared; held to the commit here, so that one which comes
    -- meanwhile waits and then looks.
    IF NOT pg_try_advisory_xact_lock(1347571761, 3) THEN
        -- Where a few messages are is told at once; others look. A name that a plain INSERT got past the alphabet is found by the poll.
        IF messages = count AND count <= 64 THEN
            news := CASE WHEN last_topic ~ '[^A-Za-z0-9._:/-]' THEN '' ELSE
                concat_ws(' ', last_topic, last_head, concat_ws(':', last_slot, bytes, array_to_string(xids, ','), array_to_string(seqs, ','),
                    array_to_string(keys, ',', '-'))) END;
        ELSE
            SELECT coalesce(string_agg(concat_ws(' ', t.topic, t.head, '-'), ' '), '') INTO news FROM unnest(topics, heads) AS t (topic, head)
            WHERE t.topic !~ '[^A-Za-z0-9._:/-]';
        END IF;
        IF octet_length(news) > 7000 THEN
            news := '';
        END IF;
        ignored := pg_notify('postbox_segment', news)::text;
    END IF;
END $$;
COMMENT ON FUNCTION postbox.step IS
    'One step of the sequencer: gives every message that became visible since the last step its offset. To be called with the settings of postbox.sequence. A caller that passes back what it was returned in last_… saves looking that up, and is then not told topics, heads and counts where messages are few. news is what consumers are told: topic, head, and where the messages are or -, for each topic; empty if that is too much. rows are the messages, if they are few and none is longer than the caller wants. Any number may call it at once. Fails (PB002) in a database that was restored from another cluster, until postbox.rebase().';

CREATE FUNCTION postbox.sequence() RETURNS TABLE (topic text, head bigint, messages bigint)
    LANGUAGE sql VOLATILE
    -- Plans made while the tables were empty would scan sequentially for ever; and the cost that enable_seqscan adds
    -- switches JIT on, which takes hundreds of milliseconds. Groups are to come as they were sorted. A dispatcher has them as settings of its
    -- session, since changing them costs too much for a small step.
    SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashagg = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
    SELECT u.* FROM postbox.step(NULL, NULL) s, unnest(s.topics, s.heads, s.counts) AS u (topic, head, messages)
$$;
COMMENT ON FUNCTION postbox.sequence IS 'One step of the sequencer, for use by hand; a row is a topic that got messages.';

------------------------------------------------------------------------------------------------------------------ consuming

CREATE FUNCTION postbox.first_offset(of_topic text) RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    result bigint;
BEGIN
    SELECT s.base INTO result FROM postbox.segment s WHERE s.topic = of_topic ORDER BY s.base LIMIT 1;
    RETURN coalesce(result, postbox.next_offset(of_topic));
END $$;
COMMENT ON FUNCTION postbox.first_offset IS 'The earliest retained offset of a topic.';

CREATE FUNCTION postbox.offset_at(of_topic text, since timestamptz) RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET jit = off AS $$
DECLARE
    result bigint;
    first  postbox.segment;
BEGIN
    -- A message is published before it is sequenced, so the first one published since then is in or after this segment.
    SELECT s.* INTO first FROM postbox.segment s WHERE s.topic = of_topic AND s.sequenced_at >= since ORDER BY s.base LIMIT 1;
    IF NOT FOUND THEN
        RETURN postbox.next_offset(of_topic);
    END IF;
    SELECT first.base + min(a.n) - 1 INTO result
    FROM unnest(first.xids, first.seqs) WITH ORDINALITY AS a (xid, seq, n)
    JOIN postbox.outbox o ON o.slot = first.slot AND o.xid = a.xid AND o.seq = a.seq
    WHERE o.published_at >= since;
    RETURN coalesce(result, first.base + first.count);
END $$;
COMMENT ON FUNCTION postbox.offset_at IS 'The offset of the first message of a topic that was published at or after an instant.';

CREATE FUNCTION postbox.start_offset(of_topic text, start text, value text) RETURNS bigint
    LANGUAGE sql STABLE AS $$
    SELECT CASE start
        WHEN 'earliest' THEN postbox.first_offset(of_topic)
        WHEN 'latest' THEN postbox.next_offset(of_topic)
        WHEN 'offset' THEN least(greatest(value::bigint, postbox.first_offset(of_topic)), postbox.next_offset(of_topic))
        WHEN 'time' THEN postbox.offset_at(of_topic, value::timestamptz)
        WHEN 'ago' THEN postbox.offset_at(of_topic, postbox.clock() - value::interval)
    END
$$;
COMMENT ON FUNCTION postbox.start_offset IS
    'Where a start position is: earliest, latest, offset N, time (an instant), ago (a span).';

CREATE FUNCTION postbox.subscribe(
    of_group text, to_topic text, with_lanes smallint, with_order text, for_node text, start text, start_value text
) RETURNS TABLE (id integer, lanes smallint, order_mode text)
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    new_id integer;
BEGIN
    INSERT INTO postbox.subscription (group_name, topic, lanes, order_mode, node)
    VALUES (of_group, to_topic, with_lanes, with_order, for_node)
    ON CONFLICT (group_name, topic) DO NOTHING
    RETURNING subscription.id INTO new_id;
    IF new_id IS NOT NULL THEN
        INSERT INTO postbox.lane (subscription_id, lane, position)
        SELECT new_id, n, p.position
        FROM (SELECT postbox.start_offset(to_topic, start, start_value) AS position) p, generate_series(0, with_lanes - 1) n;
    ELSIF with_order <> 'topic' THEN
        -- Between key and none nothing that is stored changes.
        UPDATE postbox.subscription s SET order_mode = with_order
        WHERE s.group_name = of_group AND s.topic = to_topic AND s.order_mode NOT IN (with_order, 'topic');
    END IF;
    RETURN QUERY SELECT s.id, s.lanes, s.order_mode FROM postbox.subscription s
        WHERE s.group_name = of_group AND s.topic = to_topic;
END $$;
COMMENT ON FUNCTION postbox.subscribe IS 'Registers a subscription with its lanes at its start position, or finds the one there is.';

CREATE FUNCTION postbox.is_live(of_consumer integer) RETURNS boolean
    LANGUAGE sql STABLE
    RETURN EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 1347571763 AND l.objid = of_consumer::oid
        AND l.objsubid = 2 AND l.granted AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()));
COMMENT ON FUNCTION postbox.is_live IS 'Whether a consumer''s session holds its lock.';

CREATE FUNCTION postbox.heartbeat(of_consumer integer, said jsonb, last_beat integer) RETURNS integer
    LANGUAGE plpgsql AS $$
DECLARE
    beat integer;
BEGIN
    SELECT greatest(extract(epoch FROM clock_timestamp() - c.started_at) * 10, 0)::integer INTO beat
    FROM postbox.consumer c WHERE c.id = of_consumer;
    IF beat IS NOT NULL THEN
        -- The new one first, so that nobody sees none.
        PERFORM pg_advisory_lock_shared(1347571767, beat);
        PERFORM pg_advisory_unlock_shared(1347571767, last_beat);
        INSERT INTO postbox.heartbeat (consumer_id, report) VALUES (of_consumer, said);
    END IF;
    RETURN beat;
END $$;
COMMENT ON FUNCTION postbox.heartbeat IS
    'A consumer says, in its own session, that it is alive, and of itself what postbox status shows. Returns a number to pass to the next call; null: it is not registered any more.';

CREATE FUNCTION postbox.sessions() RETURNS TABLE (consumer_id integer, heartbeat_at timestamptz, in_time boolean)
    LANGUAGE sql STABLE AS $$
    -- Once, so that a session and its heartbeat are of one moment.
    WITH locks AS MATERIALIZED (
        SELECT l.classid::bigint AS class, l.objid::bigint AS number, l.pid FROM pg_locks l
        WHERE l.locktype = 'advisory' AND l.classid IN (1347571763, 1347571767) AND l.objsubid = 2 AND l.granted
            AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
    )
    SELECT n.id, n.heartbeat_at, n.heartbeat_at + n.lease > clock_timestamp()
    FROM (
        SELECT c.id, c.lease, c.started_at + coalesce(max(h.number), 0) * interval '100 milliseconds' AS heartbeat_at
        FROM locks s JOIN postbox.consumer c ON c.id = s.number LEFT JOIN locks h ON h.class = 1347571767 AND h.pid = s.pid
        WHERE s.class = 1347571763 GROUP BY c.id, c.lease, c.started_at) n
$$;
COMMENT ON FUNCTION postbox.sessions IS
    'The consumers whose sessions hold their locks, when each said last that it is alive (its start is the first time), and whether its lease still lasts.';

CREATE FUNCTION postbox.last_report(of_consumer integer, OUT heartbeat_at timestamptz, OUT report jsonb)
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
BEGIN
    SELECT h.at, h.report INTO heartbeat_at, report FROM postbox.heartbeat h
    WHERE h.consumer_id = of_consumer ORDER BY h.at DESC LIMIT 1;
    IF NOT FOUND THEN
        SELECT c.heartbeat_at, c.report INTO heartbeat_at, report FROM postbox.consumer c WHERE c.id = of_consumer;
    END IF;
END $$;
COMMENT ON FUNCTION postbox.last_report IS 'When a consumer, alive or not, had its last heartbeat, and what it said.';

CREATE FUNCTION postbox.checkpoint(
    by_consumer integer, subscriptions integer[], lanes smallint[], epochs integer[], positions bigint[],
    pending_subscriptions integer[], pending_offsets bigint[], lanes_of_pending smallint[] DEFAULT NULL
) RETURNS bigint
    LANGUAGE plpgsql
    SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    accepted bigint;
BEGIN
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

-- A procedure: CALL is not planned, which a SELECT by a message's text would be. Of few expressions, since each is prepared anew in every transaction.
CREATE PROCEDURE postbox.settle(by_consumer integer, of_subscription integer, of_lane integer, of_epoch integer, of_offset bigint)
    LANGUAGE plpgsql AS $$
BEGIN
    -- The lock is shared, through the commit: a takeover takes it exclusively before it raises the epoch. It is never null.
    IF current_setting('transaction_isolation') <> 'read committed'
        OR pg_advisory_xact_lock_shared(1347571762, of_subscription * 1024 + of_lane) IS NULL
    THEN
        RAISE EXCEPTION 'a transactional handler must run in READ COMMITTED, not %', current_setting('transaction_isolation')
            USING HINT = 'The fence must see a takeover that is newer than the transaction''s snapshot: do not SET TRANSACTION in a handler.';
    END IF;
    -- A statement of its own, with a newer snapshot than the lock.
    INSERT INTO postbox.settlement (subscription_id, lane, "offset")
    SELECT l.subscription_id, l.lane, of_offset FROM postbox.lane l
    WHERE l.subscription_id = of_subscription AND l.lane = of_lane AND l.epoch = of_epoch AND l.consumer_id = by_consumer;
    -- The owner's session holds its lock exclusively for as long as it lives. After a crash of PostgreSQL offsets that were
    -- never flushed may be given anew, so what a session knew is worth nothing without it.
    IF NOT FOUND OR pg_try_advisory_xact_lock_shared(1347571763, by_consumer) THEN
        RAISE EXCEPTION 'lane % of subscription % is no longer owned by consumer % in epoch %',
            of_lane, of_subscription, by_consumer, of_epoch USING ERRCODE = 'PB001';
    END IF;
END $$;
COMMENT ON PROCEDURE postbox.settle IS
    'The last statement of a transactional handler: settles its message in its transaction, or fails (PB001) if the lane has another owner.';

CREATE FUNCTION postbox.settle_batch(
    by_consumer integer, of_subscription integer, of_lanes smallint[], of_epochs integer[], lanes_of_offsets smallint[], offsets bigint[]
) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    mine bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'a transactional handler must run in READ COMMITTED, not %', current_setting('transaction_isolation')
            USING HINT = 'The fence must see a takeover that is newer than the transaction''s snapshot: do not SET TRANSACTION in a handler.';
    END IF;
    -- As in settle. In order, so that two calls, or a call and a seek, cannot wait for each other.
    PERFORM pg_advisory_xact_lock_shared(1347571762, of_subscription * 1024 + u.lane)
    FROM (SELECT l.lane FROM unnest(of_lanes) AS l (lane) ORDER BY 1) u;
    SELECT count(*) INTO mine
    FROM unnest(of_lanes, of_epochs) AS u (lane, epoch)
    JOIN postbox.lane l ON l.subscription_id = of_subscription AND l.lane = u.lane AND l.epoch = u.epoch AND l.consumer_id = by_consumer;
    IF mine < cardinality(of_lanes) OR pg_try_advisory_xact_lock_shared(1347571763, by_consumer) THEN
        RAISE EXCEPTION 'consumer % no longer owns all of the lanes % of subscription %', by_consumer, of_lanes, of_subscription
            USING ERRCODE = 'PB001';
    END IF;
    INSERT INTO postbox.settlement (subscription_id, lane, "offset")
    SELECT of_subscription, u.lane, u."offset" FROM unnest(lanes_of_offsets, offsets) AS u (lane, "offset");
END $$;
COMMENT ON FUNCTION postbox.settle_batch IS
    'As postbox.settle, for messages of several lanes: all of them, or none if any of the lanes has another owner.';
