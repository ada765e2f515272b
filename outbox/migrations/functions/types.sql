-- Types of messages: which a subscription's instances handle, which wait for an instance that does. See docs/internals/ownership.md.

CREATE OR REPLACE FUNCTION postbox.live_types(of_subscription integer) RETURNS TABLE (consumer_id integer, type text)
    LANGUAGE sql STABLE AS $$
    SELECT c.id, t.type FROM postbox.sessions() l JOIN postbox.consumer c ON c.id = l.consumer_id
    CROSS JOIN LATERAL jsonb_array_elements_text(c.types -> of_subscription::text) AS t (type)
    WHERE of_subscription = ANY (c.subscriptions)
$$;
COMMENT ON FUNCTION postbox.live_types IS
    'Which message types the live instances of a subscription handle. *: all. An empty text: untyped messages.';

CREATE OR REPLACE FUNCTION postbox.waiting(of_subscription integer, OUT messages bigint, OUT types text[])
    LANGUAGE sql STABLE AS $$
    SELECT
        (SELECT count(*) FROM postbox.redelivery r WHERE r.subscription_id = of_subscription AND r.state = 'waiting')
            + (SELECT count(*) FROM postbox.parked_key p WHERE p.subscription_id = of_subscription AND p.waits_for IS NOT NULL),
        (SELECT coalesce(array_agg(DISTINCT n.type ORDER BY n.type), '{}')
            FROM postbox.lane l CROSS JOIN LATERAL unnest(l.needs) AS n (type)
            WHERE l.subscription_id = of_subscription
                AND NOT EXISTS (SELECT FROM postbox.live_types(of_subscription) t WHERE t.type IN (n.type, '*')))
$$;
COMMENT ON FUNCTION postbox.waiting IS
    'How many messages of a subscription wait for an instance that handles their type, not counting what is parked behind them, and which of these types no live instance handles.';

CREATE OR REPLACE FUNCTION postbox.settled_unknown(of_subscription integer, OUT messages bigint, OUT types jsonb)
    LANGUAGE sql STABLE AS $$
    WITH said AS MATERIALIZED (
        SELECT e.entry FROM postbox.subscription s JOIN postbox.consumer c ON s.id = ANY (c.subscriptions) AND postbox.is_live(c.id)
        CROSS JOIN LATERAL postbox.last_report(c.id) r
        CROSS JOIN LATERAL jsonb_array_elements(CASE jsonb_typeof(r.report) WHEN 'array' THEN r.report ELSE '[]' END) AS e (entry)
        WHERE s.id = of_subscription AND e.entry ->> 'group' = s.group_name AND e.entry ->> 'topic' = s.topic
    )
    SELECT (SELECT coalesce(sum((s.entry ->> 'unknown')::bigint), 0)::bigint FROM said s),
        (SELECT coalesce(jsonb_object_agg(t.type, t.count), '{}') FROM (
            SELECT e.key AS type, sum(e.value::bigint) AS count FROM said s CROSS JOIN LATERAL jsonb_each_text(s.entry -> 'unknown_types') e
            GROUP BY e.key) t)
$$;
COMMENT ON FUNCTION postbox.settled_unknown IS
    'How many messages the live instances of a subscription have settled without handling them, since no instance handles their type and they are told to; and by type.';

CREATE OR REPLACE FUNCTION postbox.recent_types(of_topic text, at_most integer) RETURNS TABLE (type text)
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    head bigint := postbox.next_offset(of_topic);
BEGIN
    RETURN QUERY
    SELECT DISTINCT o.type FROM postbox.segment g CROSS JOIN LATERAL unnest(g.xids, g.seqs) AS a (xid, seq)
    CROSS JOIN LATERAL (SELECT o.type FROM postbox.outbox o WHERE o.slot = g.slot AND o.xid = a.xid AND o.seq = a.seq OFFSET 0) o
    WHERE g.topic = of_topic COLLATE "default" AND g.base >= head - at_most;
END $$;
COMMENT ON FUNCTION postbox.recent_types IS 'Which types the last messages of a topic have, about so many of them. Null: untyped.';
