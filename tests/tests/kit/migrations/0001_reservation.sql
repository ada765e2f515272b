CREATE TABLE reservation (order_id bigint PRIMARY KEY, runs integer NOT NULL DEFAULT 1);
