-- Forgets records of a shared ledger (docs/fleet.md, B) by whole days, oldest first. What they add up to stays.
--   psql "$(cat secrets/ledger-url)" -v keep_days=30 -f config/ledger-retention.sql
-- as the user of the sidecars, by a job once a day. A day is kept as long as a lane has something of it to deliver, or a
-- sidecar has records as old that are not here yet: the notices say so. A record of a forgotten day that comes after
-- all is refused, since nobody could tell whether it was counted: it is parked where it comes from (`not_storable`).
\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '5s'; -- who writes or reads meanwhile goes first: the next run does it
SELECT set_config('metering.keep_days', :'keep_days', true) AS keep_days \gset
CREATE OR REPLACE FUNCTION metering.refuse_forgotten() RETURNS trigger LANGUAGE plpgsql AS $refuse$
BEGIN
  RAISE EXCEPTION 'records of % are forgotten', NEW.day USING ERRCODE = '22M01';
END $refuse$;
DO $forget$
DECLARE
  keep integer := current_setting('metering.keep_days');
  horizon date := (now() AT TIME ZONE 'UTC')::date - keep;
  one record;
  home text;
  last bigint;
  waits text;
BEGIN
  IF keep < 1 THEN
    RAISE EXCEPTION 'keep_days is a number of days, 1 or more, and not less than SIDECAR_RETENTION';
  END IF;
  FOR one IN
    SELECT inhrelid::regclass AS part, to_date(right(relname, 8), 'YYYYMMDD') AS day
    FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
    WHERE inhparent = 'metering.records'::regclass AND relname ~ '^records_[0-9]{8}$'
      AND relname <> 'records_19700101' -- ids without a time
      AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = inhrelid AND tgname = 'forgotten')
    ORDER BY 2
  LOOP
    EXIT WHEN one.day >= horizon;
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', one.part);
    SELECT string_agg(instance, ', ' ORDER BY instance) INTO waits FROM metering.instances
    WHERE oldest_pending < (one.day + 1)::timestamp AT TIME ZONE 'UTC';
    IF waits IS NOT NULL THEN
      RAISE NOTICE '% is kept: % has records as old that are not here yet', one.day, waits;
      EXIT;
    END IF;
    FOR lane IN 0..15 LOOP
      home := format('metering_lane_%s', lpad(lane::text, 2, '0'));
      EXECUTE format('SELECT max(lane_seq) FROM %s WHERE lane = $1', one.part) INTO last USING lane;
      CONTINUE WHEN last IS NULL OR to_regclass(home || '.cursor') IS NULL;
      EXECUTE format(
        'SELECT string_agg(b.name, '', '' ORDER BY b.name) FROM %1$I.backend b '
        'LEFT JOIN %1$I.cursor c ON c.backend = b.name AND c.instance = $1 '
        'WHERE b.removed = 0 AND (coalesce(c.seq, 0) < $2 OR EXISTS ('
        'SELECT FROM %1$I.sealed s WHERE s.cursor = c.id AND s.settled = 0 AND s.first_seq <= $2))', home)
      INTO waits USING format('lane-%s', right(home, 2)), last;
      EXIT WHEN waits IS NOT NULL;
    END LOOP;
    IF waits IS NOT NULL THEN
      RAISE NOTICE '% is kept: % has not been told of all of it by lane %', one.day, waits, right(home, 2);
      EXIT;
    END IF;
    EXECUTE format('TRUNCATE %s', one.part);
    EXECUTE format(
      'CREATE TRIGGER forgotten BEFORE INSERT ON %s FOR EACH ROW EXECUTE FUNCTION metering.refuse_forgotten()', one.part);
    RAISE NOTICE '% is forgotten', one.day;
  END LOOP;
END $forget$;
COMMIT;
