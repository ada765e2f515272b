-- Publishing from SQL, and the limits that a message keeps.
--
-- What publishes runs in the caller's transaction, under whatever search_path that has, so everything is qualified (search_path.sql).

CREATE OR REPLACE FUNCTION postbox.is_name(name text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN octet_length(name) BETWEEN 1 AND 255 AND name !~ '[^A-Za-z0-9._:/-]' COLLATE "C";
COMMENT ON FUNCTION postbox.is_name IS 'Whether a text may name a topic, a message type or a consumer group.';

CREATE OR REPLACE FUNCTION postbox.wrong_header(headers jsonb) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (
    SELECT h.name FROM jsonb_object_keys(headers) AS h (name)
    WHERE h.name !~ '^[A-Za-z0-9._-]{1,128}$' OR h.name LIKE 'postbox-%'
    LIMIT 1);
COMMENT ON FUNCTION postbox.wrong_header IS 'A name among headers that a publisher may not give; null: none.';

-- The rules are these, and those of outbox/src/rules.rs, which a test compares with them. One expression where nothing is wrong, since each is
-- prepared anew in every transaction.
CREATE OR REPLACE FUNCTION postbox.broken_rule(topic text, type text, key text, headers jsonb, content_type text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF pg_catalog.octet_length(topic) OPERATOR(pg_catalog.>=) 1 AND pg_catalog.octet_length(topic) OPERATOR(pg_catalog.<=) 255 AND topic OPERATOR(pg_catalog.!~) '[^A-Za-z0-9._:/-]' COLLATE pg_catalog."C"
        AND (type IS NULL OR (pg_catalog.octet_length(type) OPERATOR(pg_catalog.>=) 1 AND pg_catalog.octet_length(type) OPERATOR(pg_catalog.<=) 255 AND type OPERATOR(pg_catalog.!~) '[^A-Za-z0-9._:/-]' COLLATE pg_catalog."C"))
        AND (key IS NULL OR pg_catalog.octet_length(key) OPERATOR(pg_catalog.<=) 1024)
        AND (headers IS NULL OR (pg_catalog.jsonb_typeof(headers) OPERATOR(pg_catalog.=) 'object' AND pg_catalog.octet_length(headers::pg_catalog.text) OPERATOR(pg_catalog.<=) 16384
            AND postbox.wrong_header(headers) IS NULL))
        AND (content_type IS NULL OR content_type OPERATOR(pg_catalog.~) '^[ -~]{1,255}$' COLLATE pg_catalog."C")
    THEN
        RETURN NULL;
    END IF;
    RETURN CASE
        WHEN topic IS NULL THEN 'the topic is missing: a topic is 1 to 255 characters of A-Z a-z 0-9 . _ - : /'
        WHEN NOT postbox.is_name(topic) THEN pg_catalog.format(
            'topic %L is not allowed: a topic is 1 to 255 characters of A-Z a-z 0-9 . _ - : /', pg_catalog.left(topic, 300))
        WHEN NOT postbox.is_name(type) THEN pg_catalog.format(
            'type %L is not allowed: a message type is 1 to 255 characters of A-Z a-z 0-9 . _ - : /', pg_catalog.left(type, 300))
        WHEN pg_catalog.octet_length(key) OPERATOR(pg_catalog.>) 1024 THEN pg_catalog.format(
            'the key has %s bytes: a key has at most 1,024 bytes, so use a digest of it as the key', pg_catalog.octet_length(key))
        WHEN pg_catalog.jsonb_typeof(headers) OPERATOR(pg_catalog.<>) 'object' THEN pg_catalog.format(
            'the headers are a JSON %s: they are an object of names and values', pg_catalog.jsonb_typeof(headers))
        WHEN pg_catalog.octet_length(headers::pg_catalog.text) OPERATOR(pg_catalog.>) 16384 THEN pg_catalog.format(
            'the headers have %s bytes as JSON: at most 16,384 are allowed, so move large values into the payload',
            pg_catalog.octet_length(headers::pg_catalog.text))
        WHEN headers IS NOT NULL AND postbox.wrong_header(headers) IS NOT NULL THEN pg_catalog.format(
            'header name %L is not allowed: a name is 1 to 128 characters of A-Z a-z 0-9 . _ - and does not begin with "postbox-", which is reserved',
            pg_catalog.left(postbox.wrong_header(headers), 300))
        ELSE pg_catalog.format('content type %L is not allowed: it is 1 to 255 visible ASCII characters such as application/json', pg_catalog.left(content_type, 300))
    END;
END $$;
COMMENT ON FUNCTION postbox.broken_rule IS 'Which limit a message breaks, as a sentence that names the field and the limit; null: none.';

CREATE OR REPLACE FUNCTION postbox.key_hash(key text) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (hashtextextended(key COLLATE "default", 0) & 2147483647)::integer;
COMMENT ON FUNCTION postbox.key_hash IS
    'The hash that decides a key''s lane for ever: 31 bits of hashtextextended, which is stable across PostgreSQL versions because hash partitioning relies on it.';

CREATE OR REPLACE FUNCTION postbox.order_hash(topic text, key text) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN hashtext((topic || ' ' || coalesce(key, '')) COLLATE "default");
COMMENT ON FUNCTION postbox.order_hash IS
    'Number of the lock of a topic and key. Whoever takes several takes them in the order of these numbers, since different keys may share one.';

CREATE OR REPLACE FUNCTION postbox.order_lock(topic text, key text, of_many boolean DEFAULT false) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    number integer := postbox.order_hash(topic, key);
    -- How many it took in this transaction, and the last.
    taken  text[] := string_to_array(nullif(current_setting('postbox.order_locks', true), ''), ' ');
BEGIN
    IF taken[2] = number::text THEN
        RETURN;
    END IF;
    -- A key is locked in its bucket, which is locked shared; or the bucket is locked as a whole. So two transactions with one key always meet, and
    -- none has more than 64 keys and 128 buckets: the table of locks is everybody's.
    IF of_many OR taken[1]::integer >= 64 THEN
        PERFORM pg_advisory_xact_lock(1347571768, number & 127);
    ELSE
        PERFORM pg_advisory_xact_lock_shared(1347571768, number & 127);
        PERFORM pg_advisory_xact_lock(1347571764, number);
        PERFORM set_config('postbox.order_locks', (coalesce(taken[1]::integer, 0) + 1) || ' ' || number, true);
    END IF;
END $$;
COMMENT ON FUNCTION postbox.order_lock IS
    'Waits for every transaction that took it for the same topic and key, so that the order of publishing is the order of committing. A transaction that takes it for more than 64 keys, or says that it will (of_many), also waits for some others.';

CREATE OR REPLACE FUNCTION postbox.broken_time(
    deliver_at timestamptz, delay interval, expires_at timestamptz, expires_in interval, dedup_key text, dedup_window interval
) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN CASE
        WHEN deliver_at IS NOT NULL AND delay IS NOT NULL THEN 'deliver_at and delay exclude each other: give one of them'
        WHEN deliver_at >= '262143-01-01' THEN format(
            'a message cannot be due at %s: give an instant before the year 262143', deliver_at)
        WHEN delay > '3660000 days' THEN format('the delay is %s: it is at most 10,000 years', delay)
        WHEN NOT isfinite(expires_at) OR expires_at >= '262143-01-01' THEN format(
            'a message cannot expire at %s: give an instant before the year 262143, or none for one that does not expire', expires_at)
        WHEN expires_in <= '0' OR expires_in > '3660000 days' THEN format(
            'the message expires in %s: a lifetime is more than zero and at most 10,000 years', expires_in)
        WHEN octet_length(dedup_key) NOT BETWEEN 1 AND 1024 THEN format(
            'the deduplication key has %s bytes: it has 1 to 1,024 bytes', octet_length(dedup_key))
        WHEN dedup_key IS NOT NULL AND (dedup_window <= '0' OR dedup_window > '3660 days') THEN format(
            'the deduplication window is %s: it is more than zero and at most 10 years', dedup_window)
    END;
COMMENT ON FUNCTION postbox.broken_time IS
    'What is wrong with when a message is to be delivered, to expire, or to be deduplicated, as a sentence; null: nothing. What it lets by, every client can read.';

CREATE OR REPLACE FUNCTION postbox.publish_bytes(
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
    message_id pg_catalog.uuid := coalesce(publish_bytes.id, postbox.uuid7());
    due        pg_catalog.timestamptz;
    expiry     pg_catalog.timestamptz := publish_bytes.expires_at;
    broken     pg_catalog.text;
BEGIN
    -- Raised here, so that an application sees one line and not the way to it.
    broken := postbox.broken_rule(publish_bytes.topic, publish_bytes.type, publish_bytes.key, publish_bytes.headers,
        publish_bytes.content_type);
    IF broken IS NOT NULL OR publish_bytes.payload IS NULL THEN
        RAISE EXCEPTION USING MESSAGE = coalesce(broken, 'the payload is missing'),
            ERRCODE = CASE WHEN publish_bytes.topic IS NULL OR publish_bytes.payload IS NULL THEN 'not_null_violation' ELSE 'check_violation' END;
    END IF;
    IF coalesce(publish_bytes.deliver_at, publish_bytes.expires_at) IS NOT NULL
        OR coalesce(publish_bytes.delay, publish_bytes.expires_in) IS NOT NULL OR publish_bytes.dedup_key IS NOT NULL
    THEN
        broken := postbox.broken_time(publish_bytes.deliver_at, publish_bytes.delay, publish_bytes.expires_at, publish_bytes.expires_in,
            publish_bytes.dedup_key, publish_bytes.dedup_window);
        IF broken IS NOT NULL THEN
            RAISE check_violation USING MESSAGE = broken;
        END IF;
        due := coalesce(publish_bytes.deliver_at, postbox.clock() OPERATOR(pg_catalog.+) greatest(publish_bytes.delay, '0'));
        due := CASE WHEN due OPERATOR(pg_catalog.>) postbox.clock() THEN due END;
    END IF;
    IF publish_bytes.ordered THEN
        PERFORM postbox.order_lock(publish_bytes.topic, publish_bytes.key);
    END IF;
    IF publish_bytes.dedup_key IS NOT NULL THEN
        INSERT INTO postbox.deduplicated (id, topic, dedup_key, dedup_window, type, key, headers, content_type, payload, deliver_at, delay, expires_at,
            expires_in)
        VALUES (message_id, publish_bytes.topic, publish_bytes.dedup_key, publish_bytes.dedup_window, publish_bytes.type, publish_bytes.key,
                publish_bytes.headers, publish_bytes.content_type, publish_bytes.payload, publish_bytes.deliver_at, publish_bytes.delay,
                publish_bytes.expires_at, publish_bytes.expires_in)
        RETURNING id INTO message_id;
        RETURN message_id;
    END IF;
    IF publish_bytes.expires_in IS NOT NULL THEN
        expiry := least(expiry, coalesce(due, postbox.clock()) OPERATOR(pg_catalog.+) publish_bytes.expires_in);
    END IF;
    IF due IS NOT NULL THEN
        INSERT INTO postbox.own_scheduled (id, deliver_at, topic, type, key, headers, content_type, payload, expires_at)
        VALUES (message_id, due, publish_bytes.topic, publish_bytes.type, publish_bytes.key,
                CASE WHEN publish_bytes.headers OPERATOR(pg_catalog.<>) '{}' THEN publish_bytes.headers END,
                CASE WHEN publish_bytes.content_type OPERATOR(pg_catalog.<>) 'application/json' COLLATE pg_catalog."C" THEN publish_bytes.content_type END, publish_bytes.payload, expiry);
        RETURN message_id;
    END IF;
    INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload, expires_at)
    VALUES (message_id, publish_bytes.topic, publish_bytes.type, publish_bytes.key,
            CASE WHEN publish_bytes.headers OPERATOR(pg_catalog.<>) '{}' THEN publish_bytes.headers END,
            CASE WHEN publish_bytes.content_type OPERATOR(pg_catalog.<>) 'application/json' COLLATE pg_catalog."C" THEN publish_bytes.content_type END, publish_bytes.payload, expiry);
    RETURN message_id;
END $$;
COMMENT ON FUNCTION postbox.publish_bytes(text, bytea, text, text, text, jsonb, text, interval, boolean, uuid, timestamptz, interval, timestamptz, interval) IS
    'Publishes bytes of any content type in the caller''s transaction; returns the message id. deliver_at (an instant) or delay (a span) deliver it later, in the past means now; expires_at, or expires_in from when it is delivered, end its life.';

CREATE OR REPLACE FUNCTION postbox.publish_once() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    winner uuid;
BEGIN
    IF NEW.dedup_key IS NULL OR NEW.id IS NULL THEN
        RAISE null_value_not_allowed USING MESSAGE = 'postbox.deduplicated needs a dedup_key and an id: call postbox.publish';
    END IF;
    INSERT INTO postbox.dedup AS d (topic, dedup_key, id, expires_at)
    VALUES (NEW.topic, NEW.dedup_key, NEW.id, postbox.clock() + coalesce(NEW.dedup_window, '24 hours'))
    ON CONFLICT ON CONSTRAINT dedup_pkey DO UPDATE SET id = excluded.id, expires_at = excluded.expires_at
        WHERE d.expires_at <= postbox.clock()
    RETURNING d.id INTO winner;
    IF winner IS NULL THEN
        -- The conflicting row was locked by the insert, so it is committed and still there.
        SELECT d.id INTO NEW.id FROM postbox.dedup d WHERE d.topic = NEW.topic AND d.dedup_key = NEW.dedup_key;
        RETURN NEW;
    END IF;
    PERFORM postbox.publish_bytes(topic => NEW.topic, payload => NEW.payload, content_type => NEW.content_type, key => NEW.key,
        type => NEW.type, headers => NEW.headers, id => NEW.id, deliver_at => NEW.deliver_at, delay => NEW.delay,
        expires_at => NEW.expires_at, expires_in => NEW.expires_in);
    IF NEW.deliver_at IS NOT NULL OR NEW.delay IS NOT NULL THEN
        UPDATE postbox.scheduled s SET publisher = NEW.publisher WHERE s.id = NEW.id;
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION postbox.publish_once IS
    'Publishes what is inserted into postbox.deduplicated unless a message with this deduplication key was published, and returns the id of the one that was.';
CREATE OR REPLACE TRIGGER publish_once INSTEAD OF INSERT ON postbox.deduplicated FOR EACH ROW EXECUTE FUNCTION postbox.publish_once();
COMMENT ON TRIGGER publish_once ON postbox.deduplicated IS 'The only way to a deduplication key.';

CREATE OR REPLACE FUNCTION postbox.publish(
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
COMMENT ON FUNCTION postbox.publish(text, jsonb, text, text, jsonb, text, interval, boolean, uuid, timestamptz, interval, timestamptz, interval) IS
    'Publishes a JSON message in the caller''s transaction; returns the message id. SELECT postbox.publish(topic => ''orders'', key => ''42'', payload => ''{"total": 7}'')';

-- A driver that sends a number or a uuid as what it is would find no function: those do not become texts by themselves.
CREATE OR REPLACE FUNCTION postbox.publish(
    topic        text,
    payload      jsonb,
    key          anynonarray,
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
    LANGUAGE sql VOLATILE AS $$
    SELECT postbox.publish_bytes(topic, convert_to(payload::text, 'UTF8'), 'application/json', key::text, type, headers, dedup_key,
        dedup_window, ordered, id, deliver_at, delay, expires_at, expires_in)
$$;
COMMENT ON FUNCTION postbox.publish(text, jsonb, anynonarray, text, jsonb, text, interval, boolean, uuid, timestamptz, interval, timestamptz, interval) IS
    'The same with a number, a uuid or another single value as key: its text is the key.';

CREATE OR REPLACE FUNCTION postbox.publish_bytes(
    topic        text,
    payload      bytea,
    content_type text,
    key          anynonarray,
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
    LANGUAGE sql VOLATILE AS $$
    SELECT postbox.publish_bytes(topic, payload, content_type, key::text, type, headers, dedup_key, dedup_window, ordered, id, deliver_at,
        delay, expires_at, expires_in)
$$;
COMMENT ON FUNCTION postbox.publish_bytes(text, bytea, text, anynonarray, text, jsonb, text, interval, boolean, uuid, timestamptz, interval, timestamptz, interval) IS
    'The same with a number, a uuid or another single value as key: its text is the key.';

CREATE OR REPLACE FUNCTION postbox.scheduled_by(message uuid) RETURNS name
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    RETURN (SELECT s.publisher FROM postbox.scheduled s WHERE s.id = message);
COMMENT ON FUNCTION postbox.scheduled_by IS 'The role that scheduled a message which is not yet due; null: it is not pending.';

CREATE OR REPLACE FUNCTION postbox.refuse_others(message uuid) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    publisher name := postbox.scheduled_by(message);
BEGIN
    IF publisher IS NOT NULL THEN
        RAISE insufficient_privilege USING
            MESSAGE = format('message %s was scheduled by role %I: role %I may not change it', message, publisher, current_user),
            HINT = 'That role may, its members, and operators (postbox.grant).';
    END IF;
END $$;
COMMENT ON FUNCTION postbox.refuse_others IS 'Says of a message that the caller did not find among its own whether it is another role''s.';

CREATE OR REPLACE FUNCTION postbox.cancel(id uuid) RETURNS boolean
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    DELETE FROM postbox.own_scheduled s WHERE s.id = cancel.id;
    IF NOT FOUND THEN
        PERFORM postbox.refuse_others(cancel.id);
        RETURN false;
    END IF;
    RETURN true;
END $$;
COMMENT ON FUNCTION postbox.cancel IS
    'Cancels a message that is not yet due, in the caller''s transaction; its publisher may, and operators. False: it was not pending (delivered, cancelled before, or never scheduled).';

CREATE OR REPLACE FUNCTION postbox.reschedule(id uuid, deliver_at timestamptz) RETURNS boolean
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    broken text := postbox.broken_time(reschedule.deliver_at, NULL, NULL, NULL, NULL, NULL);
BEGIN
    IF broken IS NOT NULL OR reschedule.deliver_at IS NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = coalesce(broken, 'the new instant is missing: to take the message back, cancel it');
    END IF;
    UPDATE postbox.own_scheduled s SET deliver_at = reschedule.deliver_at WHERE s.id = reschedule.id;
    IF NOT FOUND THEN
        PERFORM postbox.refuse_others(reschedule.id);
        RETURN false;
    END IF;
    RETURN true;
END $$;
COMMENT ON FUNCTION postbox.reschedule IS
    'Moves a message that is not yet due to another instant, in the caller''s transaction; in the past means now. Its expiry stays. Its publisher may, and operators. False: it was not pending.';
