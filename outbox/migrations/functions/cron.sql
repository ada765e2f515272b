-- Recurring messages.

CREATE OR REPLACE FUNCTION postbox.fire(
    of_cron text, of_schedule text, of_time_zone text, expected timestamptz, due timestamptz[], following timestamptz,
    fired_from timestamptz[] DEFAULT NULL, fired_to timestamptz[] DEFAULT NULL
) RETURNS boolean
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    c postbox.cron;
BEGIN
    -- Whoever comes second waits for the row and finds that next_at has moved on.
    UPDATE postbox.cron u
    SET next_at = following, computed_at = postbox.clock(), last_at = coalesce((SELECT max(d) FROM unnest(due) d), u.last_at),
        fired = (SELECT coalesce(range_agg(tstzrange(f.lower, f.upper, '[]')), '{}')
            FROM unnest(coalesce(fired_from, due), coalesce(fired_to, due)) AS f (lower, upper)) + CASE WHEN fired_from IS NULL THEN u.fired ELSE '{}' END
    WHERE u.name = of_cron AND u.schedule = of_schedule AND u.time_zone = of_time_zone AND NOT u.paused
        AND u.next_at = expected AND u.next_at <= postbox.clock()
    RETURNING u.* INTO c;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF EXISTS (SELECT FROM unnest(due) d WHERE d > postbox.clock()) THEN
        RAISE EXCEPTION 'a firing of % would be early', of_cron;
    END IF;
    IF due <> '{}' THEN
        INSERT INTO postbox.outbox (topic, type, key, headers, content_type, payload, expires_at)
        SELECT c.topic, c.type, c.key,
            coalesce(c.headers, '{}') || jsonb_build_object('postbox-cron', c.name,
                'postbox-scheduled-at', to_char(d.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')),
            c.content_type, c.payload, postbox.clock() + c.expires_in
        FROM unnest(due) WITH ORDINALITY AS d (at, n) ORDER BY d.n;
    END IF;
    RETURN true;
END $$;
COMMENT ON FUNCTION postbox.fire IS
    'Fires a schedule for its due times and moves it on to the following one, in one transaction; false if another dispatcher did, or the schedule was changed. fired_from, fired_to: the spans of what has fired, with these; null: these besides what has.';
