-- The clock by which messages are published, and their ids.

CREATE OR REPLACE FUNCTION postbox.clock() RETURNS timestamptz
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN clock_timestamp();
COMMENT ON FUNCTION postbox.clock IS
    'The time by which messages are published, due, expired and retained. A function of its own so that a test can move it; it is inlined, so it costs nothing. Leases go by no clock of the database.';

CREATE OR REPLACE FUNCTION postbox.uuid7() RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        PLACING substring(int8send((extract(epoch FROM postbox.clock()) * 1000)::bigint) FROM 3) FROM 1 FOR 6),
        52, 1), 53, 1), 'hex')::uuid;
COMMENT ON FUNCTION postbox.uuid7 IS 'A UUID version 7 (RFC 9562): 48 bits of Unix milliseconds, then random.';
