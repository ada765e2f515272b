-- Sequences whatever has a greater seq than the last that was found, instead of what became visible since the last snapshot: a transaction
-- that commits after a later one is lost.
DO $$
DECLARE
    was text := pg_get_functiondef('postbox.step'::regproc);
    now text;
BEGIN
    now := replace(was, 'WHERE o.xid >= last_xmax',
        'WHERE o.seq > coalesce((SELECT max(x) FROM postbox.segment s, unnest(s.seqs) x), 0)');
    now := replace(now, 'WHERE o.xid = ANY (last_xip)', 'WHERE false');
    now := replace(now, 'IF last_seq IS NOT NULL THEN', 'IF false THEN');
    ASSERT now <> was, 'the function has changed: mend this file';
    EXECUTE now;
END $$;
