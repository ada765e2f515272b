-- What roles may do.

CREATE OR REPLACE FUNCTION postbox.privileges_of(kind text) RETURNS TABLE (privilege text, object text)
    LANGUAGE sql STABLE AS $$
    SELECT p.privilege, 'TABLE postbox.' || t.name
    FROM (VALUES
        -- What a publisher may write is content. Place and time are given by defaults.
        ('publisher', 'INSERT (id, topic, type, key, headers, content_type, payload, expires_at)', '{outbox}'::text[]),
        ('publisher', 'INSERT (id, deliver_at, topic, type, key, headers, content_type, payload, expires_at)', '{own_scheduled}'),
        ('publisher', 'SELECT (id)', '{own_scheduled,deduplicated}'),
        ('publisher', 'INSERT (id, topic, dedup_key, dedup_window, type, key, headers, content_type, payload, deliver_at, delay, expires_at, expires_in)',
            '{deduplicated}'),
        ('publisher', 'UPDATE (deliver_at)', '{own_scheduled}'),
        ('publisher', 'DELETE', '{own_scheduled}'),
        ('consumer', 'SELECT', '{checkpoint,cluster,consumer,cron,dead_letter,filter,heartbeat,incident,installation,lane,outbox,parked_key,pause,redelivery,retention,run,schema_migration,segment,settlement,subscription,tick,topic}'),
        ('consumer', 'INSERT', '{checkpoint,consumer,cron,dead_letter,filter,heartbeat,incident,lane,parked_key,redelivery,run,settlement,subscription}'),
        ('consumer', 'UPDATE', '{cron,dead_letter,incident,lane,parked_key,redelivery,run,subscription}'),
        ('consumer', 'UPDATE (leaving)', '{consumer}'),
        ('consumer', 'DELETE', '{consumer,filter,parked_key,redelivery}'),
        ('operator', 'DELETE', '{own_scheduled}'),
        ('operator', 'UPDATE (deliver_at)', '{own_scheduled}'),
        ('operator', 'INSERT', '{cron,edit,pause,redelivery}'),
        ('operator', 'UPDATE', '{cron,dead_letter,edit,filter,lane,redelivery,retention,scheduled,subscription}'),
        ('operator', 'DELETE', '{cron,dead_letter,edit,parked_key,pause,redelivery,reject,scheduled,settlement,subscription}')
    ) AS p (kind, privilege, tables), unnest(p.tables) AS t (name)
    WHERE p.kind = privileges_of.kind
    UNION ALL
    -- An operator sees what a viewer sees.
    SELECT 'SELECT', format('%s postbox.%I', CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.relname) FROM pg_catalog.pg_class c
    WHERE privileges_of.kind IN ('viewer', 'operator') AND c.relnamespace = 'postbox'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'S')
        -- By whose key notifications are believed.
        AND c.relname <> 'run'

    UNION ALL
    SELECT 'USAGE', 'SEQUENCE postbox.' || s.name
    FROM (VALUES ('publisher', 'outbox_seq'), ('publisher', 'scheduled_n'), ('consumer', 'checkpoint_id'), ('operator', 'checkpoint_id'),
        ('operator', 'scheduled_n')) AS s (kind, name)
    WHERE s.kind = privileges_of.kind
    UNION ALL
    -- Functions of the owner; all others do what who calls them may do.
    SELECT 'EXECUTE', 'FUNCTION ' || p.oid::regprocedure FROM pg_catalog.pg_proc p
    WHERE privileges_of.kind = 'publisher' AND p.pronamespace = 'postbox'::regnamespace AND p.proname = 'scheduled_by'
$$;
COMMENT ON FUNCTION postbox.privileges_of IS
    'What a publisher, a consumer, an operator or a viewer needs, besides USAGE of the schema: no more, and the tests prove it. Dispatchers run as the owner.';

CREATE OR REPLACE FUNCTION postbox.grant(to_role regrole, as_kind text) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    p record;
BEGIN
    IF as_kind IS NULL OR as_kind NOT IN ('publisher', 'consumer', 'operator', 'viewer') THEN
        RAISE invalid_parameter_value USING MESSAGE = format('%L is no kind of role; known are: publisher, consumer, operator, viewer', as_kind);
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA postbox TO %s', to_role);
    FOR p IN SELECT * FROM postbox.privileges_of(as_kind) LOOP
        EXECUTE format('GRANT %s ON %s TO %s', p.privilege, p.object, to_role);
    END LOOP;
    INSERT INTO postbox.role_grant (role, kind) SELECT r.rolname, as_kind FROM pg_catalog.pg_roles r WHERE r.oid = to_role
    ON CONFLICT DO NOTHING;
END $$;
COMMENT ON FUNCTION postbox.grant IS
    'Lets a role be a publisher (publish, schedule, cancel and reschedule its own), a consumer (run handlers; a publisher too if they publish), an operator (dead letters, subscriptions, schedules) or a viewer (status, doctor). A role may be several.';

CREATE OR REPLACE FUNCTION postbox.grant_publish(role regrole) RETURNS void
    LANGUAGE sql VOLATILE
    RETURN postbox.grant(role, 'publisher');
COMMENT ON FUNCTION postbox.grant_publish IS 'Lets a role publish, schedule, and cancel and reschedule what it scheduled, and nothing else.';

CREATE OR REPLACE FUNCTION postbox.revoke(from_role regrole, as_kind text) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    other text;
BEGIN
    DELETE FROM postbox.role_grant g USING pg_catalog.pg_roles r WHERE r.oid = from_role AND g.role = r.rolname AND g.kind = as_kind;
    EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA postbox FROM %s', from_role);
    EXECUTE format('REVOKE ALL ON ALL SEQUENCES IN SCHEMA postbox FROM %s', from_role);
    EXECUTE format('REVOKE ALL ON ALL ROUTINES IN SCHEMA postbox FROM %s', from_role);
    EXECUTE format('REVOKE ALL ON SCHEMA postbox FROM %s', from_role);
    FOR other IN SELECT g.kind FROM postbox.role_grant g JOIN pg_catalog.pg_roles r ON g.role = r.rolname WHERE r.oid = from_role LOOP
        PERFORM postbox.grant(from_role, other);
    END LOOP;
END $$;
COMMENT ON FUNCTION postbox.revoke IS 'Takes back what postbox.grant gave; of what the role may do in this schema only its other kinds stay.';

-- Everybody may call everything, which does what the caller may do; but for what does what the owner may do.
DO $$
DECLARE
    f regprocedure;
    g record;
BEGIN
    FOR f IN SELECT p.oid::regprocedure FROM pg_catalog.pg_proc p WHERE p.pronamespace = 'postbox'::regnamespace AND p.prosecdef LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', f);
    END LOOP;
    -- What this release brought is new to roles that were granted what the last one had.
    FOR g IN SELECT r.oid::regrole AS role, o.kind FROM postbox.role_grant o JOIN pg_catalog.pg_roles r ON o.role = r.rolname LOOP
        PERFORM postbox.grant(g.role, g.kind);
    END LOOP;
END $$;
