-- Bells: how a publisher wakes a dispatcher that sleeps. See docs/internals/bell.md.
--
-- They run in publishers' transactions, under whatever search_path these have, so everything is qualified (search_path.sql).

CREATE OR REPLACE FUNCTION postbox.ring_bell() RETURNS bigint
    LANGUAGE plpgsql AS $$
BEGIN
    -- A transaction that has notified cannot be prepared, so one that will be says so and is found by the slow poll.
    IF coalesce(pg_catalog.current_setting('postbox.two_phase', true) OPERATOR(pg_catalog.<>) 'on', true) THEN
        PERFORM pg_catalog.pg_notify('postbox_outbox', '');
    END IF;
    RETURN pg_catalog.nextval('postbox.outbox_seq');
END $$;
COMMENT ON FUNCTION postbox.ring_bell IS 'Wakes the dispatcher; returns the seq of the message for which it does.';

CREATE OR REPLACE FUNCTION postbox.ring_timers() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    -- As in postbox.ring_bell.
    IF coalesce(pg_catalog.current_setting('postbox.two_phase', true) OPERATOR(pg_catalog.<>) 'on', true) THEN
        PERFORM pg_catalog.pg_notify('postbox_scheduled', '');
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION postbox.ring_timers IS 'Wakes the dispatcher''s timers.';

CREATE OR REPLACE FUNCTION postbox.renew_place() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.deliver_at IS NULL OR NEW.deliver_at = 'infinity' THEN
        RAISE invalid_parameter_value USING MESSAGE = 'a message cannot be due at infinity: give an instant';
    END IF;
    NEW.n := nextval('postbox.scheduled_n');
    NEW.xid := pg_current_xact_id();
    RETURN NEW;
END $$;
COMMENT ON FUNCTION postbox.renew_place IS
    'A message that is rescheduled is the last of those due at the same instant, and is found by the dispatchers'' next look.';

CREATE OR REPLACE FUNCTION postbox.ring_cron() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('postbox_cron', '');
    RETURN NULL;
END $$;
COMMENT ON FUNCTION postbox.ring_cron IS 'Tells dispatchers that schedules have changed.';
