-- Offsets and lanes: where in a topic something is.

CREATE OR REPLACE FUNCTION postbox.first_offset(of_topic text) RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    result bigint;
    floor  bigint;
BEGIN
    SELECT t.first_offset INTO floor FROM postbox.topic t WHERE t.name = of_topic COLLATE "default";
    SELECT s.base INTO result FROM postbox.segment s WHERE s.topic = of_topic COLLATE "default" ORDER BY s.base LIMIT 1;
    -- A slot that somebody holds back may be older than one that was truncated: then there is a gap below the floor.
    RETURN greatest(coalesce(result, postbox.next_offset(of_topic)), floor);
END $$;
COMMENT ON FUNCTION postbox.first_offset IS 'The earliest retained offset of a topic: from it on every message is there.';

CREATE OR REPLACE FUNCTION postbox.offset_at(of_topic text, since timestamptz) RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET jit = off AS $$
DECLARE
    result bigint;
    first  postbox.segment;
BEGIN
    -- A message is published before it is sequenced, so the first one published since then is in or after this segment.
    SELECT s.* INTO first FROM postbox.segment s WHERE s.topic = of_topic COLLATE "default" AND s.sequenced_at >= since ORDER BY s.base LIMIT 1;
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

CREATE OR REPLACE FUNCTION postbox.start_offset(of_topic text, start text, value text) RETURNS bigint
    LANGUAGE sql STABLE AS $$
    SELECT CASE start
        WHEN 'earliest' THEN postbox.first_offset(of_topic)
        WHEN 'latest' THEN postbox.next_offset(of_topic)
        WHEN 'offset' THEN least(greatest(value::bigint, postbox.first_offset(of_topic)), postbox.next_offset(of_topic))
        WHEN 'time' THEN greatest(postbox.offset_at(of_topic, value::timestamptz), postbox.first_offset(of_topic))
        WHEN 'ago' THEN greatest(postbox.offset_at(of_topic, postbox.clock() - value::interval), postbox.first_offset(of_topic))
    END
$$;
COMMENT ON FUNCTION postbox.start_offset IS
    'Where a start position is: earliest, latest, offset N, time (an instant), ago (a span).';

CREATE OR REPLACE FUNCTION postbox.lane_of(at bigint, key_hash integer, lanes integer) RETURNS smallint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (coalesce(key_hash, at) % lanes)::smallint;
COMMENT ON FUNCTION postbox.lane_of IS 'The lane of a message: by the hash of its key, or by its offset if it has none.';

CREATE OR REPLACE FUNCTION postbox.segment_at(of_topic text, at bigint) RETURNS postbox.segment
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    result postbox.segment;
BEGIN
    SELECT s.* INTO result FROM postbox.segment s WHERE s.topic = of_topic COLLATE "default" AND s.base <= at ORDER BY s.base DESC LIMIT 1;
    IF at < result.base + result.count THEN
        RETURN result;
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION postbox.segment_at IS 'The segment that holds an offset; null if there is none.';

CREATE OR REPLACE FUNCTION postbox.lane_at(of_topic text, at bigint, lanes integer) RETURNS smallint
    LANGUAGE plpgsql STABLE AS $$
DECLARE
    s postbox.segment := postbox.segment_at(of_topic, at);
BEGIN
    IF s.base IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN postbox.lane_of(at, s.keys[at - s.base + 1], lanes);
END $$;
COMMENT ON FUNCTION postbox.lane_at IS 'The lane of the message at an offset; null if it is not retained.';
