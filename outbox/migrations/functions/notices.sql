-- What is heard: whom to believe; and what was odd.

CREATE OR REPLACE FUNCTION postbox.run_key() RETURNS bytea
    LANGUAGE plpgsql AS $$
DECLARE
    here   oid    := (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
    known  bigint := postbox.system_identifier();
    result bytea;
BEGIN
    FOR attempt IN 1..2 LOOP
        -- Who may not know the cluster takes it for the same.
        SELECT r.key INTO result FROM postbox.run r
        WHERE r.database = here AND coalesce(r.system_identifier = known, true);
        EXIT WHEN FOUND;
        INSERT INTO postbox.run AS r (database, system_identifier) VALUES (here, known)
        ON CONFLICT (only_one) DO UPDATE
        SET key = excluded.key, database = excluded.database, system_identifier = excluded.system_identifier, since = excluded.since
        WHERE r.database <> excluded.database OR r.system_identifier <> excluded.system_identifier;
    END LOOP;
    RETURN result;
END $$;
COMMENT ON FUNCTION postbox.run_key IS
    'The key of this run of the database, by which its sequencer''s notifications are known; made by the first who asks. Another one says that commits may have been lost meanwhile, by a crash, a failover or a recovery.';

CREATE OR REPLACE FUNCTION postbox.note_incident(of_kind text, by_observer text, in_words text, more bigint DEFAULT 1) RETURNS void
    LANGUAGE sql VOLATILE AS $$
    INSERT INTO postbox.incident AS i (kind, observer, what, times) VALUES (of_kind, by_observer, in_words, more)
    ON CONFLICT (kind, observer) DO UPDATE SET what = excluded.what, times = i.times + excluded.times, last_at = excluded.last_at
$$;
COMMENT ON FUNCTION postbox.note_incident IS 'Notes something odd for postbox doctor.';
