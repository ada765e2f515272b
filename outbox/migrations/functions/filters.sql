-- Filters: which messages a handler wants, as a jsonpath over {headers, payload, key, type}. See docs/internals/filters.md.

CREATE OR REPLACE FUNCTION postbox.filter_position(filter text, why text) RETURNS integer
    LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    near   text := substring(why FROM 'at or near "(.*)" of jsonpath input');
    at     integer := 0;
    next   integer;
    before text;
BEGIN
    IF why LIKE '%at end of jsonpath input%' THEN
        RETURN length(filter) + 1;
    END IF;
    -- Of all places where that stands it is the one up to which nothing is wrong but that it ends.
    LOOP
        next := position(near IN substr(filter, at + 1));
        IF near = '' OR coalesce(next, 0) = 0 THEN
            RETURN NULL;
        END IF;
        at := at + next;
        BEGIN
            before := NULL;
            PERFORM left(filter, at - 1)::jsonpath;
        EXCEPTION WHEN OTHERS THEN
            before := SQLERRM;
        END;
        IF before IS NULL OR before LIKE '%at end of jsonpath input%' OR before LIKE 'unterminated quoted string%' OR btrim(left(filter, at - 1)) = '' THEN
            BEGIN
                PERFORM left(filter, at - 1 + length(near))::jsonpath;
            EXCEPTION WHEN OTHERS THEN
                IF SQLERRM = why THEN
                    RETURN at;
                END IF;
            END;
        END IF;
    END LOOP;
END $$;
COMMENT ON FUNCTION postbox.filter_position IS
    'At which character of a text, from 1, the parser of jsonpath stopped, by its message; null: it does not say (its messages may be in another language).';

CREATE OR REPLACE FUNCTION postbox.check_filter(filter text) RETURNS jsonpath
    LANGUAGE plpgsql STABLE AS $$
DECLARE
    path jsonpath;
    at   integer;
BEGIN
    IF filter IS NULL OR filter !~ '\S' THEN
        RAISE EXCEPTION 'the filter is empty' USING ERRCODE = 'PB009', HINT = 'A filter is a condition such as $.headers.region == "EU".';
    END IF;
    BEGIN
        path := filter::jsonpath;
    EXCEPTION WHEN OTHERS THEN
        at := postbox.filter_position(filter, SQLERRM);
        RAISE EXCEPTION 'the filter cannot be read%: %', coalesce(' at character ' || at, ''), SQLERRM USING ERRCODE = 'PB009',
            HINT = 'A filter is a condition in SQL/JSON path, such as $.headers.region == "EU" && $.payload.total > 100.';
    END;
    -- Without texts and names: what is left of a variable is a $ before its name.
    IF regexp_replace(path::text, '"([^"\\]|\\.)*"', '""', 'g') ~ '\$""' THEN
        RAISE EXCEPTION 'the filter has a variable: %', path USING ERRCODE = 'PB009', HINT = 'Nobody gives it a value. A member is written $.name.';
    END IF;
    IF regexp_replace(path::text, '"([^"\\]|\\.)*"', '', 'g') !~ '\$' THEN
        RAISE EXCEPTION 'the filter is no condition: % says the same of every message', path USING ERRCODE = 'PB009',
            HINT = 'A filter asks for something of the message, such as $.headers.region == "EU".';
    END IF;
    -- A condition says true, false or null of everything, of nothing too.
    BEGIN
        PERFORM jsonb_path_match_tz('{}', path);
    EXCEPTION WHEN OTHERS THEN
        RAISE EXCEPTION 'the filter is no condition: % gives values, not true or false', path USING ERRCODE = 'PB009',
            HINT = 'Compare them, such as $.payload.urgent == true, or ask whether there are any: exists($.payload.items[*] ? (@.sku == "A1")).';
    END;
    RETURN path;
END $$;
COMMENT ON FUNCTION postbox.check_filter IS
    'The filter, if it is a condition in jsonpath without variables; else an error (PB009) that says what is wrong and where.';

CREATE OR REPLACE FUNCTION postbox.filter_reads_payload(filter jsonpath) RETURNS boolean
    LANGUAGE sql IMMUTABLE
    -- Without what it reads of the rest, and without texts: if it still begins at the root somewhere, that may be the payload.
    RETURN regexp_replace(regexp_replace(filter::text, '\$\."(headers|key|type)"', '', 'g'), '"([^"\\]|\\.)*"', '', 'g') ~ '\$';
COMMENT ON FUNCTION postbox.filter_reads_payload IS 'Whether what a filter says may depend on the payload.';

-- What is the server's trouble, and not the message's, is an error, and is tried again.
CREATE OR REPLACE FUNCTION postbox.refused_by(
    filters jsonpath[], type text, key text, headers jsonb, content_type text, payload bytea
) RETURNS smallint[]
    LANGUAGE plpgsql STABLE AS $$
DECLARE
    is_json boolean := payload IS NOT NULL
        AND (content_type OPERATOR(pg_catalog.!~*) '^[[:space:]]*((application|text)/json|[^[:space:];/]+/[^[:space:];]+[+]json)[[:space:]]*(;|$)') IS NOT TRUE;
    message pg_catalog.jsonb;
    refused smallint[] := '{}';
BEGIN
    BEGIN
        IF is_json THEN
            message := pg_catalog.jsonb_build_object('type', type, 'key', key, 'headers', coalesce(headers, '{}'),
                'payload', pg_catalog.convert_from(payload, 'UTF8')::pg_catalog.jsonb);
        ELSE
            message := pg_catalog.jsonb_build_object('type', type, 'key', key, 'headers', coalesce(headers, '{}'));
        END IF;
        FOR n IN 1 .. pg_catalog.cardinality(filters) LOOP
            IF pg_catalog.jsonb_path_match_tz(message, filters[n], '{}', true) IS NOT TRUE THEN
                refused := pg_catalog.array_append(refused, n::smallint);
            END IF;
        END LOOP;
        RETURN refused;
    EXCEPTION
        WHEN insufficient_resources OR system_error OR internal_error THEN
            RAISE;
        WHEN OTHERS THEN
            refused := '{}';
    END;
    -- Each by itself, so that what one filter or the payload is in for is nobody else's.
    BEGIN
        message := pg_catalog.jsonb_build_object('type', type, 'key', key, 'headers', coalesce(headers, '{}'));
        IF is_json THEN
            message := pg_catalog.jsonb_build_object('type', type, 'key', key, 'headers', coalesce(headers, '{}'),
                'payload', pg_catalog.convert_from(payload, 'UTF8')::pg_catalog.jsonb);
        END IF;
    EXCEPTION
        WHEN insufficient_resources OR system_error OR internal_error THEN
            RAISE;
        WHEN OTHERS THEN
            -- It is no JSON, or none that jsonb can hold.
            NULL;
    END;
    FOR n IN 1 .. pg_catalog.cardinality(filters) LOOP
        BEGIN
            IF pg_catalog.jsonb_path_match_tz(message, filters[n], '{}', true) IS NOT TRUE THEN
                refused := pg_catalog.array_append(refused, n::smallint);
            END IF;
        EXCEPTION
            WHEN insufficient_resources OR system_error OR internal_error THEN
                RAISE;
            WHEN OTHERS THEN
                refused := pg_catalog.array_append(refused, (OPERATOR(pg_catalog.-) n)::smallint);
        END;
    END LOOP;
    RETURN refused;
END $$;
COMMENT ON FUNCTION postbox.refused_by IS
    'Which of these filters, from 1, a message does not satisfy; negative: one that cannot be evaluated of it. Of a payload that is no JSON (or null) nothing is true. Instants without a time zone are of the session''s.';

CREATE OR REPLACE FUNCTION postbox.refuses(filter text, type text, key text, headers jsonb, content_type text, payload bytea) RETURNS boolean
    LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN postbox.refused_by(ARRAY[filter::jsonpath], type, key, headers, content_type, payload) <> '{}';
EXCEPTION WHEN OTHERS THEN
    RETURN false;
END $$;
COMMENT ON FUNCTION postbox.refuses IS 'Whether a message does not satisfy a filter, as far as this server can say.';

CREATE OR REPLACE FUNCTION postbox.filters_in_code(of_subscription integer, of_filters jsonb, of_instance text) RETURNS bigint
    LANGUAGE plpgsql AS $$
DECLARE
    last  postbox.filter;
    first bigint;
BEGIN
    SELECT * INTO last FROM postbox.filter f WHERE f.subscription_id = of_subscription ORDER BY f.n DESC LIMIT 1;
    IF (coalesce(last.filters, '{}') = of_filters) IS NOT FALSE THEN
        RETURN NULL;
    END IF;
    -- One after another; who comes second sees what the first has written.
    PERFORM FROM postbox.subscription s WHERE s.id = of_subscription FOR NO KEY UPDATE;
    SELECT * INTO last FROM postbox.filter f WHERE f.subscription_id = of_subscription ORDER BY f.n DESC LIMIT 1;
    IF coalesce(last.filters, '{}') = of_filters THEN
        RETURN NULL;
    END IF;
    first := coalesce(postbox.settled_below(of_subscription), 0);
    INSERT INTO postbox.filter (subscription_id, n, "offset", filters, instance)
    VALUES (of_subscription, coalesce(last.n, 0) + 1, first, of_filters, of_instance);
    DELETE FROM postbox.filter f WHERE f.subscription_id = of_subscription AND f.n <= last.n - 100;
    RETURN CASE WHEN last.n IS NOT NULL THEN first END;
END $$;
COMMENT ON FUNCTION postbox.filters_in_code IS
    'Notes the filters that a subscription''s handlers have in code, by type, if they are others than those noted last (null: they are not to be noted): they apply from where it stands. Returns that offset if there were others before; null: nothing has changed.';

CREATE OR REPLACE FUNCTION postbox.filter_of(of_subscription integer, of_offset bigint, of_type text) RETURNS text
    LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN f.filters ? coalesce(of_type, '') THEN f.filters ->> coalesce(of_type, '') ELSE f.filters ->> '*' END
    FROM postbox.filter f WHERE f.subscription_id = of_subscription AND f."offset" <= of_offset ORDER BY f.n DESC LIMIT 1
$$;
COMMENT ON FUNCTION postbox.filter_of IS
    'Which filter a subscription applied to messages of a type (null: untyped ones) when it came to an offset; null: none. Where its lanes were apart when the filter changed, messages between them may have met the one before.';

CREATE OR REPLACE FUNCTION postbox.filtered(of_subscription integer, OUT messages bigint, OUT errors bigint, OUT handled bigint, OUT filters jsonb[], OUT instances text[])
    LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum((e.entry ->> 'filtered')::bigint), 0)::bigint, coalesce(sum((e.entry ->> 'filter_errors')::bigint), 0)::bigint,
        coalesce(sum((e.entry ->> 'handled')::bigint), 0)::bigint,
        coalesce(array_agg(e.entry -> 'filters' ORDER BY c.name, c.id), '{}'), coalesce(array_agg(c.name ORDER BY c.name, c.id), '{}')
    FROM postbox.subscription s JOIN postbox.consumer c ON s.id = ANY (c.subscriptions) AND postbox.is_live(c.id)
    CROSS JOIN LATERAL postbox.last_report(c.id) r
    CROSS JOIN LATERAL jsonb_array_elements(CASE jsonb_typeof(r.report) WHEN 'array' THEN r.report ELSE '[]' END) AS e (entry)
    WHERE s.id = of_subscription AND e.entry ->> 'group' = s.group_name AND e.entry ->> 'topic' = s.topic
$$;
COMMENT ON FUNCTION postbox.filtered IS
    'How many messages the live instances of a subscription have passed because their filters do not want them, how many of these because a filter cannot be evaluated, how many they have handled, and which filters each has.';
