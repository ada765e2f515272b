-- Which cluster this is.

CREATE OR REPLACE FUNCTION postbox.system_identifier() RETURNS bigint
    LANGUAGE plpgsql STABLE AS $$
BEGIN
    -- Everybody may call it unless an administrator forbade it. As a statement of its own: its plan alone would be refused.
    IF has_function_privilege('pg_catalog.pg_control_system()', 'EXECUTE') THEN
        RETURN (SELECT c.system_identifier FROM pg_control_system() c);
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION postbox.system_identifier IS 'Which cluster this is: an initdb gives a new one, a physical copy keeps it. Null: we may not know.';
