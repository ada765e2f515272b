-- What functions rely on, whatever database and role default to.

CREATE OR REPLACE FUNCTION postbox.require_read_committed(what text) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION '% must run in READ COMMITTED, not %', what, current_setting('transaction_isolation')
            USING ERRCODE = 'PB008', HINT = 'What it reads must be newer than its locks: SET TRANSACTION ISOLATION LEVEL READ COMMITTED first.';
    END IF;
END $$;
COMMENT ON FUNCTION postbox.require_read_committed IS
    'Fails where a transaction reads with one snapshot throughout: who takes a lock and then reads must see what was committed before it had the lock.';
