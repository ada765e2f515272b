-- The airline's own tables. They know nothing of Postbox.

CREATE TABLE aircraft (
    tail_number text PRIMARY KEY,
    events      integer NOT NULL DEFAULT 0
);

CREATE TABLE flight (
    id              integer PRIMARY KEY,
    carrier         text        NOT NULL,
    number          integer     NOT NULL,
    aircraft        text REFERENCES aircraft,
    origin          text        NOT NULL,
    destination     text        NOT NULL,
    scheduled_at    timestamptz NOT NULL,
    state           text        NOT NULL DEFAULT 'scheduled'
                    CHECK (state IN ('scheduled', 'departed', 'arrived', 'cancelled')),
    departed_at     timestamptz,
    departure_delay integer,
    arrived_at      timestamptz,
    arrival_delay   integer
) WITH (fillfactor = 60);

-- What the group "statistics" keeps.
CREATE TABLE delay_statistics (
    carrier               text,
    destination           text,
    departures            bigint NOT NULL,
    departure_delay       bigint NOT NULL,
    worst_departure_delay integer,
    arrivals              bigint NOT NULL,
    arrival_delay         bigint NOT NULL,
    worst_arrival_delay   integer,
    cancellations         bigint NOT NULL,
    PRIMARY KEY (carrier, destination)
) WITH (fillfactor = 20);
