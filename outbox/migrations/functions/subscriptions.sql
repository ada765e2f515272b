-- Subscriptions: registered, paced, dropped.

CREATE OR REPLACE FUNCTION postbox.subscription_id(of_group text, of_topic text) RETURNS integer
    LANGUAGE plpgsql STABLE AS $$
DECLARE
    result integer;
BEGIN
    SELECT s.id INTO result FROM postbox.subscription s WHERE s.group_name = of_group COLLATE "default" AND s.topic = of_topic COLLATE "default";
    IF NOT FOUND THEN
        RAISE EXCEPTION 'group % has no subscription to topic %', of_group, of_topic
            USING ERRCODE = 'PB004', HINT = 'postbox subscriptions list shows those there are.';
    END IF;
    RETURN result;
END $$;
COMMENT ON FUNCTION postbox.subscription_id IS 'The subscription of a group to a topic, or an error (PB004).';

CREATE OR REPLACE FUNCTION postbox.subscribe(
    of_group text, to_topic text, with_lanes smallint, with_order text, for_node text, start text, start_value text
) RETURNS TABLE (id integer, lanes smallint, order_mode text)
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    new_id integer;
BEGIN
    INSERT INTO postbox.subscription (group_name, topic, lanes, order_mode, node, paused)
    VALUES (of_group, to_topic, with_lanes, with_order, for_node,
        EXISTS (SELECT FROM postbox.pause p WHERE p.group_name = of_group COLLATE "default" AND p.topic IN ('', to_topic COLLATE "default")))
    ON CONFLICT (group_name, topic) DO NOTHING
    RETURNING subscription.id INTO new_id;
    IF new_id IS NOT NULL THEN
        INSERT INTO postbox.lane (subscription_id, lane, position)
        SELECT new_id, n, p.position
        FROM (SELECT postbox.start_offset(to_topic, start, start_value) AS position) p, generate_series(0, with_lanes - 1) n;
    ELSIF with_order <> 'topic' THEN
        -- Between key and none nothing that is stored changes.
        UPDATE postbox.subscription s SET order_mode = with_order
        WHERE s.group_name = of_group COLLATE "default" AND s.topic = to_topic COLLATE "default" AND s.order_mode NOT IN (with_order, 'topic');
    END IF;
    RETURN QUERY SELECT s.id, s.lanes, s.order_mode FROM postbox.subscription s
        WHERE s.group_name = of_group COLLATE "default" AND s.topic = to_topic COLLATE "default";
END $$;
COMMENT ON FUNCTION postbox.subscribe IS 'Registers a subscription with its lanes at its start position, or finds the one there is.';

CREATE OR REPLACE FUNCTION postbox.pause(of_group text, of_topic text, paused boolean) RETURNS bigint
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    subscriptions bigint;
BEGIN
    IF pause.paused THEN
        INSERT INTO postbox.pause (group_name, topic) VALUES (of_group, coalesce(of_topic, '')) ON CONFLICT DO NOTHING;
    ELSE
        DELETE FROM postbox.pause p WHERE p.group_name = of_group COLLATE "default" AND p.topic = coalesce(of_topic COLLATE "default", p.topic);
    END IF;
    UPDATE postbox.subscription s SET paused = pause.paused WHERE s.group_name = of_group COLLATE "default" AND s.topic = coalesce(of_topic COLLATE "default", s.topic);
    GET DIAGNOSTICS subscriptions = ROW_COUNT;
    RETURN subscriptions;
END $$;
COMMENT ON FUNCTION postbox.pause(text, text, boolean) IS
    'Pauses a group on a topic, or (null) on all its topics, or lets it go on; what subscribes later begins paused. Returns how many subscriptions there are.';

CREATE OR REPLACE FUNCTION postbox.drop_subscription(of_subscription integer) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    name text;
BEGIN
    DELETE FROM postbox.subscription s WHERE s.id = of_subscription RETURNING format('%s on %s', s.group_name, s.topic) INTO name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no subscription %', of_subscription USING ERRCODE = 'PB004';
    END IF;
    IF of_subscription IN (SELECT * FROM postbox.live_subscriptions()) THEN
        RAISE EXCEPTION 'the subscription of % is served by a live consumer', name
            USING ERRCODE = 'PB005', HINT = 'Stop its consumers first.';
    END IF;
END $$;
COMMENT ON FUNCTION postbox.drop_subscription IS
    'Forgets a subscription, its position, its failed messages and its dead letters. It must have no live consumer.';

CREATE OR REPLACE FUNCTION postbox.expires_at(last_live_at timestamptz, node text) RETURNS timestamptz
    LANGUAGE sql STABLE AS $$
    -- Who is live is noted once an hour.
    SELECT last_live_at + interval '1 hour' + CASE WHEN node IS NULL THEN r.expire_abandoned_after
        ELSE least(r.expire_abandoned_after, r.expire_nodes_after) END
    FROM postbox.retention r
$$;
COMMENT ON FUNCTION postbox.expires_at IS
    'When a subscription is dropped that has had no live consumer since then, of a node or of a group; null: never.';

CREATE OR REPLACE FUNCTION postbox.watch_subscriptions() RETURNS TABLE (expired text)
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    settings postbox.retention;
    s        postbox.subscription;
BEGIN
    SELECT * INTO settings FROM postbox.retention;
    -- While no dispatcher watched, nobody knows who was alive: the time without a consumer begins anew. So it does where the clock was set.
    IF settings.watched_at NOT BETWEEN postbox.clock() - interval '1 hour' AND postbox.clock() + interval '1 minute' THEN
        UPDATE postbox.subscription SET last_live_at = postbox.clock();
        UPDATE postbox.retention SET watched_at = postbox.clock();
    ELSE
        UPDATE postbox.subscription s SET last_live_at = postbox.clock()
        WHERE s.last_live_at < postbox.clock() - interval '1 hour' AND s.id IN (SELECT * FROM postbox.live_subscriptions());
    END IF;
    UPDATE postbox.retention SET watched_at = postbox.clock() WHERE watched_at < postbox.clock() - interval '10 minutes';
    FOR s IN SELECT * FROM postbox.subscription s
        WHERE postbox.expires_at(s.last_live_at, s.node) < postbox.clock()
            AND s.id NOT IN (SELECT * FROM postbox.live_subscriptions())
    LOOP
        PERFORM postbox.drop_subscription(s.id);
        expired := format('%s on %s', s.group_name, s.topic);
        RETURN NEXT;
    END LOOP;
    -- Of messages that are gone.
    DELETE FROM postbox.edit e USING postbox.subscription s WHERE s.id = e.subscription_id AND e."offset" < postbox.first_offset(s.topic);
END $$;
COMMENT ON FUNCTION postbox.watch_subscriptions IS
    'Notes which subscriptions have a live consumer, and drops those that had none for longer than retention.expire_abandoned_after, or expire_nodes_after; returns which.';

CREATE OR REPLACE FUNCTION postbox.pace_in_code(of_subscription integer, rate double precision, instance_rate double precision, daily_window text)
    RETURNS void
    LANGUAGE sql VOLATILE AS $$
    UPDATE postbox.subscription s
    SET rate_limit_in_code = rate, instance_rate_limit_in_code = instance_rate, drain_window_in_code = daily_window
    WHERE s.id = of_subscription AND (s.rate_limit_in_code, s.instance_rate_limit_in_code, s.drain_window_in_code)
        IS DISTINCT FROM (rate, instance_rate, daily_window)
$$;
COMMENT ON FUNCTION postbox.pace_in_code IS 'Notes the limits and the window that a subscription''s handlers have in code.';

CREATE OR REPLACE FUNCTION postbox.pace(
    of_subscription integer, OUT paused boolean, OUT rate_limit double precision, OUT instance_rate_limit double precision, OUT drain_window text
)
    LANGUAGE sql STABLE AS $$
    SELECT s.paused, nullif(coalesce(s.rate_limit, s.rate_limit_in_code), 'infinity'),
        nullif(coalesce(s.instance_rate_limit, s.instance_rate_limit_in_code), 'infinity'),
        nullif(coalesce(s.drain_window, s.drain_window_in_code), 'always')
    FROM postbox.subscription s WHERE s.id = of_subscription
$$;
COMMENT ON FUNCTION postbox.pace IS 'What holds for a subscription: what an operator says, else what the code says; null: no limit, no window.';
