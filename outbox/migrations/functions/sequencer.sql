-- The sequencer: gives committed messages their offsets. See docs/internals/sequencer.md.

CREATE OR REPLACE FUNCTION postbox.next_offset(of_topic text) RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    result bigint;
BEGIN
    SELECT s.base + s.count INTO result FROM postbox.segment s WHERE s.topic = of_topic COLLATE "default" ORDER BY s.base DESC LIMIT 1;
    IF result IS NULL THEN
        SELECT t.next_offset INTO result FROM postbox.topic t WHERE t.name = of_topic COLLATE "default";
    END IF;
    RETURN coalesce(result, 0);
END $$;
COMMENT ON FUNCTION postbox.next_offset IS 'The offset that the next message of a topic gets; the number of messages sequenced so far.';

CREATE OR REPLACE FUNCTION postbox.open_topic(of_topic text) RETURNS boolean
    LANGUAGE plpgsql AS $$
BEGIN
    IF NOT postbox.is_name(of_topic) THEN
        RETURN false;
    END IF;
    INSERT INTO postbox.topic (name) VALUES (of_topic) ON CONFLICT DO NOTHING;
    RETURN true;
END $$;
COMMENT ON FUNCTION postbox.open_topic IS 'Notes a topic that has no messages yet; false if it may not be one.';

CREATE OR REPLACE FUNCTION postbox.reject(slots smallint[], xids xid8[], seqs bigint[], why text DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    n integer;
BEGIN
    BEGIN
        INSERT INTO postbox.reject (seq, xid, slot, id, published_at, topic, type, key, headers, content_type, payload, expires_at, reason)
        SELECT o.seq, o.xid, o.slot, o.id, o.published_at, o.topic, o.type, o.key, o.headers, o.content_type, o.payload, o.expires_at,
            coalesce(why, postbox.broken_rule(o.topic, o.type, o.key, o.headers, o.content_type))
        FROM unnest(slots, xids, seqs) AS u (slot, xid, seq)
        JOIN postbox.outbox o ON o.slot = u.slot AND o.xid = u.xid AND o.seq = u.seq
        ON CONFLICT (seq) DO NOTHING;
        RETURN;
    EXCEPTION WHEN OTHERS THEN
        IF cardinality(seqs) = 1 THEN
            -- The row itself cannot be read. What is known of it must do.
            INSERT INTO postbox.reject (seq, xid, slot, reason)
            VALUES (seqs[1], xids[1], slots[1], coalesce(why || '; ', '') || 'its row cannot be copied: ' || SQLERRM)
            ON CONFLICT (seq) DO NOTHING;
            RETURN;
        END IF;
    END;
    FOR n IN 1 .. cardinality(seqs) LOOP
        PERFORM postbox.reject(slots[n:n], xids[n:n], seqs[n:n], why);
    END LOOP;
END $$;
COMMENT ON FUNCTION postbox.reject IS 'Sets messages aside that cannot be sequenced.';

CREATE OR REPLACE FUNCTION postbox.next_part(at_most bigint, OUT since pg_snapshot, OUT look pg_snapshot, OUT from_seq bigint, OUT to_seq bigint)
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    done      bigint;
    last_xmax xid8;
    last_xip  xid8[];
BEGIN
    SELECT t.snapshot, t.part_look, t.part_seq INTO since, look, done FROM postbox.tick t ORDER BY t.id DESC LIMIT 1;
    look := coalesce(look, pg_current_snapshot());
    last_xmax := coalesce(pg_snapshot_xmax(since), '0');
    last_xip := ARRAY(SELECT pg_snapshot_xip(since));
    SELECT min(n.seq) INTO from_seq FROM (
        SELECT o.seq FROM postbox.outbox o
        WHERE o.xid >= last_xmax AND (o.seq > done) IS NOT FALSE AND pg_visible_in_snapshot(o.xid, look)
        UNION ALL
        SELECT o.seq FROM postbox.outbox o
        WHERE o.xid = ANY (last_xip) AND (o.seq > done) IS NOT FALSE AND pg_visible_in_snapshot(o.xid, look)
    ) n;
    to_seq := from_seq + coalesce(at_most, 10000) - 1;
END $$;
COMMENT ON FUNCTION postbox.next_part IS
    'Which messages are the next part of a step that is done in parts: those that look sees and since does not, with numbers from from_seq to to_seq; null: there are no more.';

CREATE OR REPLACE FUNCTION postbox.end_part(since pg_snapshot, look pg_snapshot, to_seq bigint) RETURNS bigint
    LANGUAGE sql VOLATILE AS $$
    INSERT INTO postbox.tick (id, snapshot, part_look, part_seq)
    SELECT nextval('postbox.tick_id'), CASE WHEN to_seq IS NULL THEN look ELSE coalesce(since, '1:1:') END,
        CASE WHEN to_seq IS NOT NULL THEN look END, to_seq
    RETURNING id
$$;
COMMENT ON FUNCTION postbox.end_part IS 'Notes how far a step that is done in parts has come; without a number it is done.';

CREATE OR REPLACE FUNCTION postbox.step(
    INOUT last_tick bigint, INOUT last_look pg_snapshot, INOUT last_seq bigint DEFAULT NULL, INOUT last_slot smallint DEFAULT NULL,
    INOUT last_topic text DEFAULT NULL, INOUT last_head bigint DEFAULT NULL, wanted_bytes integer DEFAULT NULL,
    at_most bigint DEFAULT NULL, seal text DEFAULT NULL, run_key bytea DEFAULT NULL,
    OUT messages bigint, OUT topics text[], OUT heads bigint[], OUT counts bigint[], OUT news text, OUT rows postbox.outbox[],
    OUT rejected bigint
)
    LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    look        pg_catalog.pg_snapshot;
    last_xmax   pg_catalog.xid8;
    last_xip    pg_catalog.xid8[];
    latest      bigint;
    foreigner   pg_catalog.text;
    ignored     pg_catalog.text;
    -- The segment that is being made, in last_slot.
    topic       pg_catalog.text;
    count       integer := 0;
    bytes       bigint := 0;
    xids        pg_catalog.xid8[];
    seqs        bigint[];
    keys        integer[];
    types       integer[];
    first_head  bigint;
    -- The messages of its topic, and which of them are its own.
    its         record;
    low         integer;
    high        integer;
    -- The next message.
    its_xid     pg_catalog.xid8;
    its_seq     bigint;
    its_topic   pg_catalog.text;
    its_key     integer;
    its_type    integer;
    its_bytes   integer;
    its_row     postbox.outbox[];
    its_look    pg_catalog.pg_snapshot;
    -- Of a step that is done in parts.
    part_since  pg_catalog.pg_snapshot;
    part_look   pg_catalog.pg_snapshot;
    part_from   bigint;
    part_to     bigint;
    found       pg_catalog.refcursor;
BEGIN
    -- One condition, since each is prepared anew in every transaction. Until the path is known everything is qualified.
    IF pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'read committed'
        OR pg_catalog.current_setting('search_path') OPERATOR(pg_catalog.<>) 'pg_catalog, pg_temp'
        OR pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL
    THEN
        IF pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'read committed' THEN
            RAISE EXCEPTION 'postbox.sequence() must run in READ COMMITTED, not %', pg_catalog.current_setting('transaction_isolation')
                USING ERRCODE = 'PB008', HINT = 'Its snapshot must be taken after its lock.';
        END IF;
        -- A snapshot does not tell whether it sees its own transaction's rows, so the next step could not know which of them were found.
        IF pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL THEN
            RAISE EXCEPTION 'postbox.sequence() must run in a transaction of its own, before anything is written in it'
                USING ERRCODE = 'PB008', HINT = 'Commit first.';
        END IF;
        -- As SET search_path of a function would, which costs a small step more than the rest of this. A dispatcher's session has it.
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    END IF;
    messages := 0;
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
        SELECT t.id, t.snapshot, t.part_look INTO last_tick, last_look, part_look FROM postbox.tick t ORDER BY t.id DESC LIMIT 1;
        last_seq := NULL;
        last_topic := NULL;
        seal := NULL;
        IF at_most IS NOT NULL OR part_look IS NOT NULL THEN
            SELECT p.* INTO part_since, part_look, part_from, part_to FROM postbox.next_part(at_most) p;
        END IF;
    END IF;
    IF seal IS NULL THEN
        -- The caller could not know the number of this tick: others took steps, or it is the database's first. Under the lock nobody else takes it.
        latest := coalesce(pg_sequence_last_value('postbox.tick_id'), 0) + 1;
        seal := encode(substr(sha256(run_key || convert_to(latest::text, 'UTF8')), 1, 16), 'hex') || ' ' || latest;
        latest := NULL;
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
        FOR its_xid, its_seq, its_topic, its_key, its_type, its_bytes, its_row, its_look IN
            SELECT o.xid, o.seq, o.topic, postbox.key_hash(o.key), postbox.key_hash(o.type), octet_length(o.payload),
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
            types[count] := its_type;
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
        -- Only the first of a topic is looked at, so that the others cost nothing.
        IF last_head = 0 AND NOT postbox.open_topic(topic) THEN
            PERFORM postbox.reject(array_fill(last_slot, ARRAY[count]), xids, seqs);
            rejected := count;
            last_topic := NULL;
            rows := NULL;
        ELSE
            INSERT INTO postbox.segment (slot, topic, base, count, bytes, xids, seqs, keys, types)
            VALUES (last_slot, topic, last_head, count, bytes, xids, seqs, CASE WHEN array_remove(keys, NULL) <> '{}' THEN keys END,
                nullif(CASE WHEN array_remove(types, types[1]) = '{}' THEN types[1:1] ELSE types END, '{NULL}'));
            messages := count;
            last_head := last_head + count;
            IF cardinality(rows) < count THEN
                rows := NULL;
            END IF;
        END IF;
    ELSE
        last_xip := ARRAY(SELECT pg_snapshot_xip(last_look));
        latest := pg_sequence_last_value('postbox.outbox_seq');
        topic := NULL;
        rows := NULL;
        -- What became visible since the last tick, by seq, not by xid: a transaction's xid may be older than its insert. The aggregates keep the
        -- order in which they are fed, which is that of their groups. The last group is none: it is there to have this statement's snapshot, for
        -- the new tick, when there is no other.
        -- No key and no type are -1 here: an array with nulls has no places, so each slice of it would be looked for from the beginning.
        IF part_look IS NULL THEN
            OPEN found FOR
                SELECT m.topic, array_agg(m.slot) AS slots, array_agg(m.xid) AS xids, array_agg(m.seq) AS seqs, array_agg(m.key) AS keys,
                    array_agg(m.type) AS types, array_agg(m.bytes) AS bytes, pg_current_snapshot() AS look
                FROM (
                    SELECT o.seq, o.xid, o.slot, octet_length(o.payload) AS bytes, o.topic COLLATE "C" AS topic,
                        coalesce(postbox.key_hash(o.key), -1) AS key, coalesce(postbox.key_hash(o.type), -1) AS type
                    FROM postbox.outbox o WHERE o.xid >= last_xmax
                    UNION ALL
                    SELECT o.seq, o.xid, o.slot, octet_length(o.payload), o.topic COLLATE "C", coalesce(postbox.key_hash(o.key), -1),
                        coalesce(postbox.key_hash(o.type), -1)
                    FROM postbox.outbox o WHERE o.xid = ANY (last_xip)
                    UNION ALL
                    SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL
                    ORDER BY topic, seq) m
                GROUP BY m.topic;
        ELSE
            OPEN found FOR
                SELECT m.topic, array_agg(m.slot) AS slots, array_agg(m.xid) AS xids, array_agg(m.seq) AS seqs, array_agg(m.key) AS keys,
                    array_agg(m.type) AS types, array_agg(m.bytes) AS bytes, pg_current_snapshot() AS look
                FROM (
                    SELECT o.seq, o.xid, o.slot, octet_length(o.payload) AS bytes, o.topic COLLATE "C" AS topic,
                        coalesce(postbox.key_hash(o.key), -1) AS key, coalesce(postbox.key_hash(o.type), -1) AS type
                    FROM postbox.outbox o WHERE o.xid >= last_xmax AND o.seq BETWEEN part_from AND part_to AND pg_visible_in_snapshot(o.xid, part_look)
                    UNION ALL
                    SELECT o.seq, o.xid, o.slot, octet_length(o.payload), o.topic COLLATE "C", coalesce(postbox.key_hash(o.key), -1),
                        coalesce(postbox.key_hash(o.type), -1)
                    FROM postbox.outbox o WHERE o.xid = ANY (last_xip) AND o.seq BETWEEN part_from AND part_to AND pg_visible_in_snapshot(o.xid, part_look)
                    UNION ALL
                    SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL
                    ORDER BY topic, seq) m
                GROUP BY m.topic;
        END IF;
        LOOP
            FETCH found INTO its;
            look := its.look;
            EXIT WHEN its.topic IS NULL;
            -- Not as it is, which is in another collation than the indexes that are looked into.
            topic := its.topic;
            first_head := postbox.next_offset(topic);
            IF first_head = 0 AND NOT postbox.open_topic(topic) THEN
                PERFORM postbox.reject(its.slots, its.xids, its.seqs);
                rejected := coalesce(rejected, 0) + cardinality(its.seqs);
                CONTINUE;
            END IF;
            last_head := first_head;
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
                keys := array_replace(its.keys[low:high], -1, NULL);
                types := array_replace(its.types[low:high], -1, NULL);
                INSERT INTO postbox.segment (slot, topic, base, count, bytes, xids, seqs, keys, types)
                VALUES (last_slot, topic, last_head, count, bytes, xids, seqs, CASE WHEN array_remove(keys, NULL) <> '{}' THEN keys END,
                    nullif(CASE WHEN array_remove(types, types[1]) = '{}' THEN types[1:1] ELSE types END, '{NULL}'));
                messages := messages + count;
                last_head := last_head + count;
            END LOOP;
            topics := topics || topic;
            heads := heads || last_head;
            counts := counts || last_head - first_head;
        END LOOP;
        CLOSE found;
        last_seq := NULL;
        IF part_look IS NOT NULL THEN
            last_tick := postbox.end_part(part_since, part_look, part_to);
            last_look := CASE WHEN part_to IS NULL THEN part_look END;
            last_topic := NULL;
        ELSE
            last_look := look;
            last_topic := topic;
            IF messages = 0 AND rejected IS NULL THEN
                RETURN;
            END IF;
        END IF;
        -- The first transaction that got an id after that snapshot is this one, and none with an older id was open: so none was open that had
        -- one, and it has one before its first number, since defaults are evaluated in the order of the columns.
        IF part_look IS NULL AND pg_current_xact_id() = pg_snapshot_xmax(look) AND pg_snapshot_xmin(look) = pg_snapshot_xmax(look) THEN
            last_seq := latest;
        END IF;
    END IF;
    IF part_look IS NULL THEN
        last_tick := nextval('postbox.tick_id');
        INSERT INTO postbox.tick (id, snapshot) VALUES (last_tick, last_look);
    END IF;

    -- Every consumer that is there to be woken holds this shared; held to the commit here, so that one which comes
    -- meanwhile waits and then looks.
    IF messages > 0 AND NOT pg_try_advisory_xact_lock(1347571761, 3) THEN
        -- Where a few messages are is told at once; others look.
        IF messages = count AND count <= 64 THEN
            news := concat_ws(' ', topic, last_head, concat_ws(':', last_slot, bytes, array_to_string(xids, ','), array_to_string(seqs, ','),
                array_to_string(keys, ',', '-'), array_to_string(types, ',', '-')));
        ELSE
            SELECT coalesce(string_agg(concat_ws(' ', t.topic, t.head, '-'), ' '), '') INTO news FROM unnest(topics, heads) AS t (topic, head);
        END IF;
        IF octet_length(news) > 7000 THEN
            news := '';
        END IF;
        -- Anybody may notify, so consumers believe what has the seal of its tick.
        ignored := pg_notify('postbox_segment', coalesce(news || ' ' || seal, news))::text;
    END IF;
END $$;
COMMENT ON FUNCTION postbox.step IS
    'One step of the sequencer: gives every message that became visible since the last step its offset. To be called with the settings of postbox.sequence. A caller that passes back what it was returned in last_… saves looking that up, and is then not told topics, heads and counts where messages are few. news is what consumers are told: topic, head, and where the messages are or -, for each topic; empty if that is too much; the notification has it with the seal of the tick, which the caller makes for the one after last_tick (and with the run''s key, postbox.run_key, it is made here where that is not the next). rows are the messages, if they are few and none is longer than the caller wants. Any number may call it at once. Fails (PB002) in a database that was restored from another cluster, until postbox.rebase(). at_most: of what is new only messages with so many numbers, in the order of the numbers, for who cannot do all at once. It needs a call without last_look, returns none until all is done, and meanwhile every step is such a part. rejected: how many were set aside (postbox.reject).';

CREATE OR REPLACE FUNCTION postbox.reject_next(why text) RETURNS bigint
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    part     record;
    slots    smallint[];
    xids     xid8[];
    seqs     bigint[];
    earliest xid8;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' OR pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION 'postbox.reject_next() must run in a READ COMMITTED transaction of its own, before anything is written in it'
            USING ERRCODE = 'PB008', HINT = 'Commit first.';
    END IF;
    PERFORM pg_advisory_xact_lock(1347571761, 1);
    SELECT * INTO part FROM postbox.next_part(1);
    IF part.from_seq IS NULL THEN
        RETURN NULL;
    END IF;
    earliest := coalesce(pg_snapshot_xmin(part.since), '0');
    SELECT array_agg(o.slot), array_agg(o.xid), array_agg(o.seq) INTO slots, xids, seqs
    FROM postbox.outbox o
    WHERE o.xid >= earliest AND o.seq = part.from_seq AND pg_visible_in_snapshot(o.xid, part.look)
        AND (part.since IS NULL OR NOT pg_visible_in_snapshot(o.xid, part.since));
    PERFORM postbox.reject(slots, xids, seqs, why), postbox.end_part(part.since, part.look, part.from_seq);
    RETURN part.from_seq;
END $$;
COMMENT ON FUNCTION postbox.reject_next IS
    'Sets aside the message that a step has to do next, because a step with it alone fails; the others go on. Returns its number.';

CREATE OR REPLACE FUNCTION postbox.readmit(
    of_seq bigint, topic text DEFAULT NULL, type text DEFAULT NULL, key text DEFAULT NULL, headers jsonb DEFAULT NULL, payload bytea DEFAULT NULL
) RETURNS uuid
    LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    r postbox.reject;
BEGIN
    DELETE FROM postbox.reject x WHERE x.seq = of_seq RETURNING x.* INTO r;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    RETURN postbox.publish_bytes(coalesce(topic, r.topic), coalesce(payload, r.payload), coalesce(r.content_type, 'application/json'),
        coalesce(key, r.key), coalesce(type, r.type), coalesce(headers, r.headers), id => r.id,
        expires_at => CASE WHEN isfinite(r.expires_at) THEN r.expires_at END);
END $$;
COMMENT ON FUNCTION postbox.readmit IS
    'Publishes a message that was set aside, under its id, in the caller''s transaction; what is given replaces what it had. Fails if it still breaks a rule; null if it is not there.';

CREATE OR REPLACE FUNCTION postbox.discard_rejects(of_seqs bigint[]) RETURNS bigint
    LANGUAGE sql VOLATILE AS $$
    WITH gone AS (DELETE FROM postbox.reject r WHERE r.seq = ANY (of_seqs) RETURNING 1)
    SELECT count(*) FROM gone
$$;
COMMENT ON FUNCTION postbox.discard_rejects IS 'Deletes messages that were set aside, for good. Returns how many.';

CREATE OR REPLACE FUNCTION postbox.sequence() RETURNS TABLE (topic text, head bigint, messages bigint)
    LANGUAGE sql VOLATILE
    -- Plans made while the tables were empty would scan sequentially for ever; and the cost that enable_seqscan adds
    -- switches JIT on, which takes hundreds of milliseconds. Groups are to come as they were sorted. A dispatcher has them as settings of its
    -- session, since changing them costs too much for a small step.
    SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashagg = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
    SELECT u.* FROM postbox.step(NULL, NULL, run_key => (SELECT r.key FROM postbox.run r)) s, unnest(s.topics, s.heads, s.counts) AS u (topic, head, messages)
$$;
COMMENT ON FUNCTION postbox.sequence IS 'One step of the sequencer, for use by hand; a row is a topic that got messages.';
