-- `cursor` is a pair of backend and instance. `sealed` has one short row for each request, for as long as
-- delivered records are kept; `payload` its bytes and records, until it is settled and none of it is parked.
-- `parts` has a row for each record with more than one event, and for those left over by `fold`.
-- `fates` has a letter for each event of a settled request: d(elivered), (d)u(plicate), p(arked), m(oved on).
CREATE TABLE meta(name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE backend(name TEXT PRIMARY KEY, since_s REAL NOT NULL, removed INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE cursor(
    id INTEGER PRIMARY KEY, backend TEXT NOT NULL, instance TEXT NOT NULL, seq INTEGER NOT NULL,
    again_upto INTEGER NOT NULL DEFAULT 0, folded_seq INTEGER NOT NULL DEFAULT 0, UNIQUE(backend, instance));
CREATE TABLE sealed(
    id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, first_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL,
    settled INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, under_way INTEGER NOT NULL DEFAULT 0,
    started_s REAL NOT NULL DEFAULT 0, due_s REAL NOT NULL DEFAULT 0, risk_s REAL, expired INTEGER NOT NULL DEFAULT 0,
    forced INTEGER NOT NULL DEFAULT 0, generation INTEGER NOT NULL DEFAULT 0, records INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL, at_s REAL NOT NULL, oldest_s REAL NOT NULL, key TEXT NOT NULL, subject TEXT NOT NULL,
    version INTEGER NOT NULL, fates TEXT, history TEXT NOT NULL DEFAULT '[]', members BLOB NOT NULL);
CREATE INDEX sealed_open ON sealed(cursor) WHERE settled = 0;
CREATE INDEX sealed_seq ON sealed(cursor, last_seq);
CREATE TABLE payload(
    request INTEGER PRIMARY KEY, path TEXT NOT NULL, content_type TEXT NOT NULL, headers TEXT NOT NULL,
    body BLOB NOT NULL, lines BLOB NOT NULL);
CREATE TABLE skipped(
    id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, reason TEXT NOT NULL, first_seq INTEGER NOT NULL,
    last_seq INTEGER NOT NULL, n INTEGER NOT NULL, seqs BLOB);
CREATE INDEX skipped_seq ON skipped(cursor, last_seq);
CREATE TABLE parked(
    id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, seq INTEGER NOT NULL, record_id TEXT NOT NULL,
    event_id TEXT NOT NULL, reason TEXT NOT NULL, maybe_taken INTEGER NOT NULL, at_s REAL NOT NULL,
    key TEXT NOT NULL, generation INTEGER NOT NULL, request INTEGER, line BLOB NOT NULL, history TEXT NOT NULL);
CREATE INDEX parked_seq ON parked(cursor, seq);
CREATE INDEX parked_request ON parked(request);
CREATE TABLE parts(
    cursor INTEGER NOT NULL, seq INTEGER NOT NULL, pending INTEGER NOT NULL, parked INTEGER NOT NULL,
    delivered INTEGER NOT NULL, duplicate INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY(cursor, seq)) WITHOUT ROWID;
CREATE TABLE counter(
    cursor INTEGER NOT NULL, folded INTEGER NOT NULL, term TEXT NOT NULL, reason TEXT NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY(cursor, folded, term, reason)) WITHOUT ROWID;
