-- Numbers that are given once.

CREATE OR REPLACE FUNCTION postbox.random_id() RETURNS integer
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN 1 + (('x' || left(gen_random_uuid()::text, 8))::bit(32)::bigint % 2147483646)::integer;
COMMENT ON FUNCTION postbox.random_id IS
    'A number from 1 on, by chance: unlike one from a sequence, it is not given again by a database that went back to an earlier state.';
