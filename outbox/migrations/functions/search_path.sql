-- Where functions look for what they name: in pg_catalog, whoever calls them and whatever others may create in the schemas of his path.
--
-- All functions get it here, after they were made or replaced, so none can be forgotten. Two kinds have none. A body that is parsed when it
-- is made (RETURN …), as defaults and triggers are, names nothing any more when it runs. And those below are called for every message: setting
-- a parameter costs them 3 to 7 µs each time, so they qualify everything, operators too (postbox.step from where it has set the path itself).

DO $$
DECLARE
    f record;
BEGIN
    FOR f IN
        SELECT p.oid::regprocedure AS name, p.prokind FROM pg_proc p
        WHERE p.pronamespace = 'postbox'::regnamespace AND p.prosqlbody IS NULL
            AND p.proname <> ALL ('{broken_rule,publish_bytes,refused_by,ring_bell,ring_timers,settle,settle_batch,step}')
    LOOP
        EXECUTE format('ALTER %s %s SET search_path = pg_catalog, pg_temp',
            CASE f.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END, f.name);
    END LOOP;
END $$;
