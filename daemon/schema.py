"""The tables of the daemon's database: how each version of them is made from the one before."""

from __future__ import annotations

_TP_FOR_TASKS_PER_NODE = """UPDATE {table} SET body = CAST(json_remove(json_set(CAST(body AS TEXT), '$.spec.tp',
    json_extract(CAST(body AS TEXT), '$.spec.nodes') * json_extract(CAST(body AS TEXT), '$.spec.tasks_per_node')),
    '$.spec.tasks_per_node') AS BLOB)"""
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE requests (
            sequence INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, pool TEXT NOT NULL,
            state TEXT NOT NULL, user TEXT NOT NULL, times TEXT NOT NULL, fingerprint TEXT NOT NULL,
            dataset TEXT NOT NULL, dump BLOB NOT NULL, attempt INTEGER NOT NULL DEFAULT 0,
            replica TEXT NOT NULL DEFAULT '', cancel INTEGER NOT NULL DEFAULT 0, error BLOB NOT NULL DEFAULT X'',
            result_bytes INTEGER NOT NULL DEFAULT 0, progress BLOB NOT NULL DEFAULT X'',
            note TEXT NOT NULL DEFAULT '')""",
        "CREATE INDEX requests_of_pool ON requests (state, pool, sequence)",
        "CREATE INDEX requests_of_dataset ON requests (dataset, sequence) WHERE dataset <> ''",
        "CREATE TABLE pools (name TEXT PRIMARY KEY, body BLOB NOT NULL)",
        "CREATE TABLE replicas (id TEXT PRIMARY KEY, body BLOB NOT NULL)",
    ),
    tuple(_TP_FOR_TASKS_PER_NODE.format(table=table) for table in ("pools", "replicas")),
    (
        "ALTER TABLE requests ADD COLUMN needs REAL NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN kills INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE events (sequence INTEGER PRIMARY KEY, subject TEXT NOT NULL, time REAL NOT NULL, text TEXT NOT NULL,
            replica TEXT NOT NULL)""",
        "CREATE INDEX events_of_subject ON events (subject, sequence)",
        """UPDATE pools SET body = CAST(json_set(CAST(body AS TEXT), '$.down', json('true')) AS BLOB)
            WHERE json_extract(CAST(body AS TEXT), '$.desired') = 0""",
        "UPDATE replicas SET body = CAST(json_remove(CAST(body AS TEXT), '$.cause') AS BLOB)",  # words; now an EndCause
    ),
    (
        "ALTER TABLE requests ADD COLUMN priority INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN batch TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE requests ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN gave_way INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN digest TEXT NOT NULL DEFAULT ''",
        "CREATE INDEX requests_of_user ON requests (user, state)",
        "CREATE TABLE usage (user TEXT PRIMARY KEY, seconds REAL NOT NULL, time REAL NOT NULL)",
    ),
    (
        "ALTER TABLE requests ADD COLUMN ended REAL NOT NULL DEFAULT 0",
        """UPDATE requests SET ended = coalesce(json_extract(times, '$.' || state), 0)
            WHERE state IN ('COMPLETED', 'FAILED', 'CANCELLED', 'EXPIRED')""",
        "CREATE INDEX requests_by_end ON requests (ended) WHERE ended > 0",
        "DROP INDEX requests_of_pool",
        "CREATE INDEX requests_of_state ON requests (state)",  # SQLite adds the sequence to each
    ),
    (
        "CREATE TABLE bodies (sequence INTEGER PRIMARY KEY, frame BLOB NOT NULL)",
        "CREATE TABLE results (sequence INTEGER PRIMARY KEY, frame BLOB NOT NULL)",
    ),
    ("ALTER TABLE requests ADD COLUMN paused INTEGER NOT NULL DEFAULT 0",),
)
"""The statements that lead from each version of the schema to the next; SQLite's ``user_version`` counts them."""
