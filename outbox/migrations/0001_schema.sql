-- The tables: the log in its ring, who consumes it, what failed, what is for later. The functions are in functions/, one subject a file.
--
-- Everything that is written per message or per batch is append-only and lives in a ring of eight partitions ("slots") that are
-- truncated whole; see docs/internals/ring.md.
--
-- Advisory locks. The two-integer space (class, object) is used with these classes; nothing else in the database may use them.
--   1347571761, 1: the sequencer; 2: the dispatcher's bell; 3: the consumers' bell; 4: migrations; 5: the timers' bell; 6: promotion;
--     7: truncation
--   1347571762, subscription * 1024 + lane: the fence of a lane
--   1347571763, consumer id: held by a consumer's session for as long as it lives
--   1347571764, hash of topic and key: ordered publishing; 1347571768, 7 bits of it: for many keys
--   1347571766, 1: postbox bench
--   1347571767, number: held shared by a consumer's session, another one each time it says that it is alive

DO $$
BEGIN
    -- An administrator may have made it and kept it.
    IF pg_has_role((SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = 'postbox'), 'USAGE') THEN
        COMMENT ON SCHEMA postbox IS
            'Postbox: transactional outbox and messaging. Publish with postbox.publish() or INSERT INTO postbox.outbox; everything else belongs to Postbox.';
    END IF;
END $$;

CREATE FUNCTION postbox.slot_of(at timestamptz) RETURNS smallint
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN ((date_part('epoch', at)::bigint / 43200) % 8)::smallint;
COMMENT ON FUNCTION postbox.slot_of IS
    'The ring slot of an instant: eight slots of twelve hours, so that a slot comes round again after four days.';

------------------------------------------------------------------------------------------------------------------- the outbox

CREATE SEQUENCE postbox.outbox_seq AS bigint CACHE 1;
COMMENT ON SEQUENCE postbox.outbox_seq IS
    'Insertion order over all topics. CACHE 1, so that a row inserted after another one''s commit has a greater number.';

-- It has no CHECK constraints and no triggers: PostgreSQL parses and plans them anew for every INSERT, which costs a publisher more than all
-- else that Postbox does. A default is part of the plan. So it is the default of seq that tries the bell: shared, and held until the commit
-- is visible. A dispatcher can only fall asleep (take it exclusively) when nobody who found it awake is still in flight. See docs/internals/bell.md.
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
    first_offset bigint     NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT postbox.clock()
);
COMMENT ON TABLE postbox.topic IS 'One row is a topic that has had a message. Written by the sequencer, once a topic.';
COMMENT ON COLUMN postbox.topic.name IS 'Topic.';
COMMENT ON COLUMN postbox.topic.next_offset IS
    'Offsets never restart: the least next offset when no segment of the topic is left. Carried forward before a slot is truncated.';
COMMENT ON COLUMN postbox.topic.first_offset IS 'Some offsets below it were truncated; from it on all are there. Written when a slot is truncated.';
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
    types        integer[],
    sequenced_at timestamptz NOT NULL DEFAULT postbox.clock()
) PARTITION BY LIST (slot);
COMMENT ON TABLE postbox.segment IS
    'One row is up to 1,024 consecutive offsets of a topic: where their messages are, and the hashes of their keys and types. Written by the sequencer, never updated; same ring as the outbox.';
COMMENT ON COLUMN postbox.segment.slot IS 'Ring slot of its messages; all of a segment are in one slot.';
COMMENT ON COLUMN postbox.segment.topic IS 'Topic.';
COMMENT ON COLUMN postbox.segment.base IS 'Offset of the first message.';
COMMENT ON COLUMN postbox.segment.count IS 'Number of messages: their offsets are base to base + count - 1.';
COMMENT ON COLUMN postbox.segment.bytes IS 'Sum of the payload lengths.';
COMMENT ON COLUMN postbox.segment.xids IS 'outbox.xid of each message.';
COMMENT ON COLUMN postbox.segment.seqs IS 'outbox.seq of each message, ascending.';
COMMENT ON COLUMN postbox.segment.keys IS 'Hash of each message''s key (postbox.key_hash); an element is null where the message has no key, and the array is null where none has.';
COMMENT ON COLUMN postbox.segment.types IS 'Hash of each message''s type (postbox.key_hash); an element is null where the message has none. One element: all are the same. Null: none has a type.';
COMMENT ON COLUMN postbox.segment.sequenced_at IS 'When the sequencer appended it.';

CREATE TABLE postbox.tick (
    slot     smallint    NOT NULL DEFAULT postbox.slot_of(postbox.clock()),
    id       bigint      NOT NULL,
    snapshot pg_snapshot NOT NULL,
    at       timestamptz NOT NULL DEFAULT postbox.clock(),
    part_look pg_snapshot,
    part_seq  bigint
) PARTITION BY LIST (slot);
COMMENT ON TABLE postbox.tick IS
    'One row is a step of the sequencer that found messages: all that its snapshot sees is in segments. Written by the sequencer, the newest counts; same ring as the outbox.';
COMMENT ON COLUMN postbox.tick.slot IS 'Ring slot, from the clock.';
COMMENT ON COLUMN postbox.tick.id IS 'Number of the step.';
COMMENT ON COLUMN postbox.tick.snapshot IS 'The snapshot with which the step read the outbox.';
COMMENT ON COLUMN postbox.tick.at IS 'When.';
COMMENT ON COLUMN postbox.tick.part_look IS
    'Of a step that is done in parts: the snapshot that it is about; what this one sees, up to part_seq, is in segments too. Null: it was done at once.';
COMMENT ON COLUMN postbox.tick.part_seq IS 'See part_look.';

CREATE TABLE postbox.reject (
    seq          bigint      PRIMARY KEY,
    xid          xid8        NOT NULL,
    slot         smallint    NOT NULL,
    reason       text        NOT NULL,
    rejected_at  timestamptz NOT NULL DEFAULT postbox.clock(),
    id           uuid,
    published_at timestamptz,
    topic        text,
    type         text,
    key          text,
    headers      jsonb,
    content_type text,
    payload      bytea,
    expires_at   timestamptz
);
COMMENT ON TABLE postbox.reject IS
    'One row is a message that was committed and cannot be sequenced: a plain INSERT broke a rule, or a step fails with it. Written by the sequencer; postbox.readmit publishes it, postbox.discard_rejects deletes it.';
COMMENT ON COLUMN postbox.reject.seq IS 'outbox.seq.';
COMMENT ON COLUMN postbox.reject.xid IS 'outbox.xid: where its row is.';
COMMENT ON COLUMN postbox.reject.slot IS 'outbox.slot: where its row is, until the slot is truncated.';
COMMENT ON COLUMN postbox.reject.reason IS 'Why.';
COMMENT ON COLUMN postbox.reject.rejected_at IS 'When it was set aside.';
COMMENT ON COLUMN postbox.reject.id IS 'Message id. This and the rest is null where the row could not be copied.';
COMMENT ON COLUMN postbox.reject.published_at IS 'As in the outbox.';
COMMENT ON COLUMN postbox.reject.topic IS 'As in the outbox.';
COMMENT ON COLUMN postbox.reject.type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.reject.key IS 'As in the outbox.';
COMMENT ON COLUMN postbox.reject.headers IS 'As in the outbox.';
COMMENT ON COLUMN postbox.reject.content_type IS 'As in the outbox.';
COMMENT ON COLUMN postbox.reject.payload IS 'The message itself.';
COMMENT ON COLUMN postbox.reject.expires_at IS 'As in the outbox.';

------------------------------------------------------------------------------------------------------------- who consumes it

CREATE TABLE postbox.subscription (
    id         integer     PRIMARY KEY GENERATED ALWAYS AS IDENTITY CHECK (id < 2097152),
    group_name text        NOT NULL,
    topic      text        NOT NULL,
    lanes      smallint    NOT NULL CHECK (lanes BETWEEN 1 AND 1024),
    order_mode text        NOT NULL CHECK (order_mode IN ('key', 'topic', 'none')),
    node       text,
    created_at timestamptz NOT NULL DEFAULT postbox.clock(),
    paused     boolean     NOT NULL DEFAULT false,
    rate_limit double precision CHECK (rate_limit > 0),
    instance_rate_limit double precision CHECK (instance_rate_limit > 0),
    drain_window text,
    rate_limit_in_code double precision CHECK (rate_limit_in_code > 0),
    instance_rate_limit_in_code double precision CHECK (instance_rate_limit_in_code > 0),
    drain_window_in_code text,
    last_live_at timestamptz NOT NULL DEFAULT postbox.clock(),
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
COMMENT ON COLUMN postbox.subscription.paused IS 'Whether no message is started.';
COMMENT ON COLUMN postbox.subscription.rate_limit IS
    'Most messages started a second by all instances together, as an operator says; infinity: no limit; null: as the code says.';
COMMENT ON COLUMN postbox.subscription.instance_rate_limit IS 'The same for each instance.';
COMMENT ON COLUMN postbox.subscription.drain_window IS
    'When messages are started, by the wall clock of a time zone, such as 22:00-06:00 Europe/Berlin, as an operator says; always: no window; null: as the code says.';
COMMENT ON COLUMN postbox.subscription.rate_limit_in_code IS
    'What the handlers of the instance that started last say, and what holds where an operator says nothing; null: no limit.';
COMMENT ON COLUMN postbox.subscription.instance_rate_limit_in_code IS 'The same for each instance.';
COMMENT ON COLUMN postbox.subscription.drain_window_in_code IS 'The same of the window; null: always.';
COMMENT ON COLUMN postbox.subscription.last_live_at IS 'When a dispatcher last saw a live consumer of it, to the hour.';

CREATE TABLE postbox.pause (
    group_name text        NOT NULL,
    topic      text        NOT NULL,
    paused_at  timestamptz NOT NULL DEFAULT postbox.clock(),
    PRIMARY KEY (group_name, topic)
);
COMMENT ON TABLE postbox.pause IS
    'One row is a pause that an operator ordered: subscriptions that come later begin paused. Written by operators.';
COMMENT ON COLUMN postbox.pause.group_name IS 'Consumer group; it need not exist yet.';
COMMENT ON COLUMN postbox.pause.topic IS 'Topic; an empty one: all of the group''s.';
COMMENT ON COLUMN postbox.pause.paused_at IS 'Since when.';

CREATE TABLE postbox.filter (
    subscription_id integer     NOT NULL REFERENCES postbox.subscription ON DELETE CASCADE,
    n               integer     NOT NULL,
    "offset"        bigint      NOT NULL,
    filters         jsonb       NOT NULL,
    since           timestamptz NOT NULL DEFAULT postbox.clock(),
    instance        text        NOT NULL,
    PRIMARY KEY (subscription_id, n)
);
COMMENT ON TABLE postbox.filter IS
    'One row is a change of a subscription''s filters, which are in its handlers'' code. Written by consumers as they start; the last hundred are kept.';
COMMENT ON COLUMN postbox.filter.subscription_id IS 'Subscription.';
COMMENT ON COLUMN postbox.filter.n IS 'Number of the change: the greatest is the newest.';
COMMENT ON COLUMN postbox.filter."offset" IS 'From there on it applied: below, everything was settled.';
COMMENT ON COLUMN postbox.filter.filters IS
    'By message type, {"order.placed": "$.payload.total > 100"}; null: all are wanted. "*": all types that are not named. "": untyped messages. {}: there is none any more.';
COMMENT ON COLUMN postbox.filter.since IS 'When it was noted.';
COMMENT ON COLUMN postbox.filter.instance IS 'Name of the instance that brought it.';

CREATE TABLE postbox.consumer (
    id            integer     PRIMARY KEY DEFAULT postbox.random_id(),
    name          text        NOT NULL,
    pid           integer     NOT NULL,
    subscriptions integer[]   NOT NULL,
    types         jsonb       NOT NULL DEFAULT '{}',
    leaving       boolean     NOT NULL DEFAULT false,
    lease         interval    NOT NULL,
    started_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    heartbeat_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    beat          integer     NOT NULL DEFAULT 0,
    report        jsonb       NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50);
COMMENT ON TABLE postbox.consumer IS
    'One row is a session of a consumer instance, which holds the advisory lock (1347571763, id) while it lives. Written by the instance at its start and end, so that looking at it costs the same whoever holds the xmin horizon.';
COMMENT ON COLUMN postbox.consumer.id IS 'Instance; a new one for every session, by chance: a number from a sequence would be given again where the database goes back to an earlier state.';
COMMENT ON COLUMN postbox.consumer.name IS 'Name of the instance (host name by default).';
COMMENT ON COLUMN postbox.consumer.pid IS 'Its process id.';
COMMENT ON COLUMN postbox.consumer.subscriptions IS 'Which subscriptions it serves.';
COMMENT ON COLUMN postbox.consumer.types IS
    'The message types that its handlers take, by subscription: {"7": ["order.paid", "order.placed"]}. "*": all. "": untyped messages.';
COMMENT ON COLUMN postbox.consumer.leaving IS 'Whether it is shutting down: it finishes what runs, and claims nothing more.';
COMMENT ON COLUMN postbox.consumer.lease IS 'For how long its heartbeat may be seen unchanged before others take over although its lock is still held.';
COMMENT ON COLUMN postbox.consumer.started_at IS 'When the session began.';
COMMENT ON COLUMN postbox.consumer.heartbeat_at IS 'Its last heartbeat, if that is not in postbox.heartbeat any more.';
COMMENT ON COLUMN postbox.consumer.beat IS 'The number of that heartbeat.';
COMMENT ON COLUMN postbox.consumer.report IS 'What it said of itself then.';

CREATE TABLE postbox.heartbeat (
    slot        smallint    NOT NULL DEFAULT postbox.slot_of(postbox.clock()),
    consumer_id integer     NOT NULL,
    beat        integer     NOT NULL,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    report      jsonb       NOT NULL
) PARTITION BY LIST (slot);
COMMENT ON TABLE postbox.heartbeat IS
    'One row is what a consumer said of itself at a heartbeat, for postbox status. Written by consumers, never updated, the newest counts; same ring as the outbox. Whether it is alive is told by locks alone.';
COMMENT ON COLUMN postbox.heartbeat.slot IS 'Ring slot, from the clock.';
COMMENT ON COLUMN postbox.heartbeat.consumer_id IS 'Instance.';
COMMENT ON COLUMN postbox.heartbeat.beat IS 'Number of the heartbeat: of an instance''s the greatest is the newest, whatever became of the clock.';
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
    crashes         integer  NOT NULL DEFAULT 0,
    checkpoint_id   bigint   NOT NULL DEFAULT 0,
    needs           text[]   NOT NULL DEFAULT '{}',
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
COMMENT ON COLUMN postbox.lane.crashes IS
    'How many owners in a row died before the lane got past what they were doing; from the second on its messages are tried one by one.';
COMMENT ON COLUMN postbox.lane.needs IS
    'Types of messages that wait in it for an instance which handles them, in the order in which they are to be served; an empty text stands for untyped ones. Some perhaps wait no more. Written by its owner, in the transaction by which they wait.';
COMMENT ON COLUMN postbox.lane.checkpoint_id IS
    'Checkpoints up to this one are in position and pending: an older one whose slot is still there says nothing. Written when the lane is claimed, and when checkpoints are truncated.';

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
    ALTER xids SET STORAGE EXTERNAL, ALTER seqs SET STORAGE EXTERNAL, ALTER keys SET STORAGE EXTERNAL, ALTER types SET STORAGE EXTERNAL;

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
CREATE INDEX heartbeat_newest ON postbox.heartbeat (consumer_id, beat);

CREATE SEQUENCE postbox.tick_id AS bigint CACHE 1;
COMMENT ON SEQUENCE postbox.tick_id IS
    'Numbers the ticks, under the sequencer''s lock: while its last value is the id of a tick that was committed, that tick is the newest.';

-- Failure: what became of messages that could not be handled at once. The exception path: these are the only rows of the consuming side that
-- are updated and deleted. See docs/internals/failure.md.

CREATE TABLE postbox.redelivery (
    subscription_id integer     NOT NULL REFERENCES postbox.subscription ON DELETE CASCADE,
    "offset"        bigint      NOT NULL,
    lane            smallint    NOT NULL,
    state           text        NOT NULL CHECK (state IN ('retry', 'parked', 'waiting', 'trying', 'halted', 'redriven', 'released')),
    attempt         integer     NOT NULL,
    due_at          timestamptz NOT NULL,
    noted_at        timestamptz NOT NULL DEFAULT postbox.clock(),
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
    'retry: waits for due_at, and its key for it. parked: waits for its predecessors, and its slot was truncated meanwhile (else see postbox.parked_key). waiting: has no key, and its owner no handler for its type. trying: an attempt that was recorded before it ran, because a process may die of it. halted: attempts exhausted, its key waits for an operator. redriven: an operator wants it run again. released: an operator lets its key go on.';
COMMENT ON COLUMN postbox.redelivery.attempt IS 'Attempts made; 0: none.';
COMMENT ON COLUMN postbox.redelivery.due_at IS 'When the next attempt is due.';
COMMENT ON COLUMN postbox.redelivery.noted_at IS 'When that was written: however the clock is set meanwhile, the wait is not longer than from here to due_at.';
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
CREATE INDEX redelivery_waiting ON postbox.redelivery (subscription_id, lane, coalesce(type, '')) WHERE state = 'waiting';

CREATE TABLE postbox.parked_key (
    subscription_id integer  NOT NULL REFERENCES postbox.subscription ON DELETE CASCADE,
    key_hash        integer  NOT NULL,
    lane            smallint NOT NULL,
    "offset"        bigint   NOT NULL,
    waits_for       text,
    PRIMARY KEY (subscription_id, key_hash)
) WITH (fillfactor = 50);
COMMENT ON TABLE postbox.parked_key IS
    'One row is a key that its lane leaves behind: its messages from this offset on are parked, in the log, until those before them are settled. Written by the lane''s owner, together with its checkpoint; deleted when the key has caught up with its lane.';
COMMENT ON COLUMN postbox.parked_key.subscription_id IS 'Subscription.';
COMMENT ON COLUMN postbox.parked_key.key_hash IS 'postbox.key_hash of the key.';
COMMENT ON COLUMN postbox.parked_key.lane IS 'Its lane.';
COMMENT ON COLUMN postbox.parked_key."offset" IS 'From here on, whatever the lane''s position, none of the key''s messages is settled or pending.';
COMMENT ON COLUMN postbox.parked_key.waits_for IS
    'The type of the first of them, where its owner had no handler for it; an empty text: it is untyped. Null: it waits for those before it.';

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

CREATE TABLE postbox.edit (
    subscription_id integer     NOT NULL REFERENCES postbox.subscription ON DELETE CASCADE,
    "offset"        bigint      NOT NULL,
    payload         bytea       NOT NULL,
    edited_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (subscription_id, "offset")
);
COMMENT ON TABLE postbox.edit IS
    'One row is a message that an operator has redriven with another payload: what a subscription is to get when it gets the message again. Deleted when the message is no longer retained.';
COMMENT ON COLUMN postbox.edit.subscription_id IS 'Subscription.';
COMMENT ON COLUMN postbox.edit."offset" IS 'The message''s offset in the topic.';
COMMENT ON COLUMN postbox.edit.payload IS 'The payload that it was redriven with.';
COMMENT ON COLUMN postbox.edit.edited_at IS 'When.';

-- Time: messages for later, recurring messages. See docs/internals/time.md.

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
    scheduled_at timestamptz NOT NULL DEFAULT postbox.clock(),
    publisher    name        NOT NULL DEFAULT current_user
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
COMMENT ON COLUMN postbox.scheduled.publisher IS 'The role that scheduled it. It may cancel and reschedule it, as may its members and operators.';
CREATE UNIQUE INDEX scheduled_due ON postbox.scheduled (deliver_at, n);
CREATE INDEX scheduled_xid ON postbox.scheduled (xid);

-- The bell of the outbox, for those rows only that may be due before the dispatcher looks again by itself.
CREATE TRIGGER ring_timers BEFORE INSERT OR UPDATE OF deliver_at ON postbox.scheduled FOR EACH ROW
    WHEN (NEW.deliver_at < postbox.clock() + interval '1 minute' AND NOT pg_try_advisory_xact_lock_shared(1347571761, 5))
    EXECUTE FUNCTION postbox.ring_timers();
COMMENT ON TRIGGER ring_timers ON postbox.scheduled IS
    'Wakes the dispatcher''s timers when they sleep and the message is due within a minute.';

CREATE TRIGGER renew_place BEFORE UPDATE OF deliver_at ON postbox.scheduled FOR EACH ROW EXECUTE FUNCTION postbox.renew_place();
COMMENT ON TRIGGER renew_place ON postbox.scheduled IS 'Of use to who may update the due time alone.';

-- A view and no policies: in these, what a function of the owner does is the owner's, and pg_dump by another role than the owner fails.
CREATE VIEW postbox.own_scheduled WITH (security_barrier) AS
    SELECT s.* FROM postbox.scheduled s
    WHERE s.publisher = current_user OR pg_has_role(to_regrole(quote_ident(s.publisher))::oid, 'USAGE')
        OR has_column_privilege('postbox.scheduled', 'publisher', 'UPDATE');
COMMENT ON VIEW postbox.own_scheduled IS
    'The messages for later that the current role may change: its own, and all for who may update the table. Publishers reach the table by this alone.';
DO $$
DECLARE
    its name;
BEGIN
    FOR its IN SELECT a.attname FROM pg_attribute a WHERE a.attrelid = 'postbox.own_scheduled'::regclass AND a.attnum > 0 LOOP
        EXECUTE format('COMMENT ON COLUMN postbox.own_scheduled.%I IS %L', its, 'As in postbox.scheduled.');
    END LOOP;
END $$;

-- Whoever might write postbox.dedup could silence what others publish. So publishers write it by this alone, and only together with the message.
-- A view, since the default of a column is evaluated as who inserts: its trigger is the owner's and could not tell.
CREATE VIEW postbox.deduplicated AS
    SELECT d.id, d.topic, d.dedup_key, NULL::interval AS dedup_window, NULL::text AS type, NULL::text AS key, NULL::jsonb AS headers,
        NULL::text AS content_type, NULL::bytea AS payload, NULL::timestamptz AS deliver_at, NULL::interval AS delay, d.expires_at,
        NULL::interval AS expires_in, NULL::name AS publisher
    FROM postbox.dedup d WHERE false;
ALTER VIEW postbox.deduplicated ALTER COLUMN publisher SET DEFAULT current_user;
COMMENT ON VIEW postbox.deduplicated IS
    'Where postbox.publish inserts a message with a deduplication key: its trigger publishes it unless one with this key was published, and returns the id of the one that was. It has no rows.';
DO $$
DECLARE
    its name;
BEGIN
    FOR its IN SELECT a.attname FROM pg_attribute a WHERE a.attrelid = 'postbox.deduplicated'::regclass AND a.attnum > 0 LOOP
        EXECUTE format('COMMENT ON COLUMN postbox.deduplicated.%I IS %L', its, 'As in postbox.publish_bytes; the publisher is who inserts.');
    END LOOP;
END $$;

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
    computed_at  timestamptz NOT NULL DEFAULT postbox.clock(),
    last_at      timestamptz,
    fired        tstzmultirange NOT NULL DEFAULT '{}',
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
COMMENT ON COLUMN postbox.cron.computed_at IS 'When that was computed. In the future: by a clock that was ahead, so that it is computed again.';
COMMENT ON COLUMN postbox.cron.last_at IS 'The due time of the last firing.';
COMMENT ON COLUMN postbox.cron.fired IS
    'Spans of due times that have fired, so that none fires twice when the clock is set back: one, unless the clock was ahead and due times before its firings are yet to come.';
COMMENT ON COLUMN postbox.cron.created_at IS 'When it was first registered.';

CREATE TRIGGER ring_cron AFTER INSERT OR UPDATE OF schedule, paused ON postbox.cron FOR EACH STATEMENT
    EXECUTE FUNCTION postbox.ring_cron();
COMMENT ON TRIGGER ring_cron ON postbox.cron IS 'A schedule changes rarely, so this one rings always; not at firings.';

--------------------------------------------------------------------------------------------------------------------- retention

CREATE TABLE postbox.retention (
    one                    boolean     PRIMARY KEY DEFAULT true CHECK (one),
    keep                   interval    NOT NULL DEFAULT '3 days',
    expire_abandoned_after interval    CHECK (expire_abandoned_after > '0'),
    expire_nodes_after     interval    DEFAULT '7 days' CHECK (expire_nodes_after > '0'),
    watched_at             timestamptz NOT NULL DEFAULT postbox.clock()
);
COMMENT ON TABLE postbox.retention IS 'The one row says how long messages are kept. Written by operators, and by the dispatcher that watches.';
COMMENT ON COLUMN postbox.retention.one IS 'There is one row.';
COMMENT ON COLUMN postbox.retention.keep IS 'For how long a message is kept at least, whoever has consumed it. Change it with postbox.set_retention().';
COMMENT ON COLUMN postbox.retention.expire_abandoned_after IS
    'A subscription without a live consumer for so long is dropped with its failed messages; null: never.';
COMMENT ON COLUMN postbox.retention.expire_nodes_after IS
    'The same for the durable broadcasts of a node, of which many come and go where nodes are named after pods; null: never.';
COMMENT ON COLUMN postbox.retention.watched_at IS 'When a dispatcher last looked which subscriptions have a live consumer.';

INSERT INTO postbox.retention DEFAULT VALUES;

------------------------------------------------------------------------------------------------------------------------ roles

CREATE TABLE postbox.role_grant (
    role       name        NOT NULL,
    kind       text        NOT NULL,
    granted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (role, kind)
);
COMMENT ON TABLE postbox.role_grant IS 'One row is what a role was made by postbox.grant, so that a migration gives it what is new.';
COMMENT ON COLUMN postbox.role_grant.role IS 'Role.';
COMMENT ON COLUMN postbox.role_grant.kind IS 'publisher, consumer, operator or viewer.';
COMMENT ON COLUMN postbox.role_grant.granted_at IS 'When.';

-- Restore into another cluster: transaction ids mean something only in the cluster that gave them. See docs/internals/restore.md.

CREATE TABLE postbox.cluster (
    only_one          boolean     PRIMARY KEY DEFAULT true CHECK (only_one),
    system_identifier bigint,
    since             timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE postbox.cluster IS
    'Its one row says in which cluster the transaction ids of this schema were given. A logical restore brings the row along, so that the new cluster is told from the old. Written by postbox.rebase.';
COMMENT ON COLUMN postbox.cluster.only_one IS 'True.';
COMMENT ON COLUMN postbox.cluster.system_identifier IS 'pg_control_system() of the cluster; null: nobody who wrote it might call that.';
COMMENT ON COLUMN postbox.cluster.since IS 'When this was found out.';

INSERT INTO postbox.cluster (system_identifier) VALUES (postbox.system_identifier());

-- Who may be believed, and what was odd.

-- Unlogged, so it is empty after a crash, in a standby that was promoted and after a recovery to a point in time: the next who asks for the key makes
-- a new one.
CREATE UNLOGGED TABLE postbox.run (
    only_one          boolean     PRIMARY KEY DEFAULT true CHECK (only_one),
    key               bytea       NOT NULL DEFAULT sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())),
    database          oid         NOT NULL,
    system_identifier bigint,
    since             timestamptz NOT NULL DEFAULT clock_timestamp()
);
REVOKE ALL ON postbox.run FROM PUBLIC;
COMMENT ON TABLE postbox.run IS
    'Its one row has the key by which consumers know that a notification is the sequencer''s, since anybody who may connect can send one. Only for roles that dispatch or consume. It is another one whenever the database may have lost commits. Written by postbox.run_key.';
COMMENT ON COLUMN postbox.run.only_one IS 'True.';
COMMENT ON COLUMN postbox.run.key IS 'By chance.';
COMMENT ON COLUMN postbox.run.database IS 'For which database: a copy gets another key.';
COMMENT ON COLUMN postbox.run.system_identifier IS 'In which cluster; null: who wrote it might not know.';
COMMENT ON COLUMN postbox.run.since IS 'When it was made.';

CREATE TABLE postbox.incident (
    kind     text        NOT NULL,
    observer text        NOT NULL,
    what     text        NOT NULL,
    times    bigint      NOT NULL,
    first_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (kind, observer)
);
COMMENT ON TABLE postbox.incident IS
    'One row is something odd that a dispatcher or consumer noticed and no other table shows, for postbox doctor. Written by postbox.note_incident, forgotten after a day.';
COMMENT ON COLUMN postbox.incident.kind IS 'Of what kind: notifications, clock (it was set), clock-offset (of an instance''s host).';
COMMENT ON COLUMN postbox.incident.observer IS 'Who noticed it.';
COMMENT ON COLUMN postbox.incident.what IS 'The last time, in words.';
COMMENT ON COLUMN postbox.incident.times IS 'How often.';
COMMENT ON COLUMN postbox.incident.first_at IS 'When first.';
COMMENT ON COLUMN postbox.incident.last_at IS 'When last.';
