-- Lets a transactional handler commit whoever owns its lane: an instance that wakes up after its lease doubles an effect.
DO $$
DECLARE
    was text := pg_get_functiondef('postbox.settle'::regproc);
    now text;
BEGIN
    now := replace(was, 'AND l.epoch = of_epoch AND l.consumer_id = by_consumer', '');
    ASSERT now <> was, 'the function has changed: mend this file';
    EXECUTE now;
END $$;
