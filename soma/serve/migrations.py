"""The schema of keys and ledger, as numbered steps in SQL that SQLite and PostgreSQL both read.

A step that was released is never changed: a new one is added after it. `tests/serve/test_database.py` holds the result
to the tables of `soma.serve.database`.
"""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    # 1: keys, their secrets, teams and budgets
    (
        "CREATE TABLE teams (name TEXT PRIMARY KEY, created_at BIGINT NOT NULL)",
        """CREATE TABLE keys (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, team TEXT REFERENCES teams (name), role TEXT NOT NULL,
            priority INTEGER NOT NULL, models TEXT, routes TEXT, created_at BIGINT NOT NULL, expires_at BIGINT,
            revoked_at BIGINT)""",
        """CREATE TABLE secrets (
            prefix TEXT PRIMARY KEY, key_id TEXT NOT NULL REFERENCES keys (id), hash TEXT NOT NULL,
            created_at BIGINT NOT NULL, expires_at BIGINT)""",
        """CREATE TABLE budgets (
            owner TEXT NOT NULL, period TEXT NOT NULL, tokens BIGINT, nano BIGINT, PRIMARY KEY (owner, period))""",
        "CREATE TABLE revision (n BIGINT NOT NULL)",
        "INSERT INTO revision (n) VALUES (0)",
    ),
    # 2: the ledger, and what each key and team has used and reserved by day and month
    (
        """CREATE TABLE ledger (
            id TEXT PRIMARY KEY, instance TEXT NOT NULL, key_id TEXT, team TEXT, model TEXT NOT NULL,
            route TEXT NOT NULL, tags TEXT NOT NULL, day TEXT NOT NULL, opened_at BIGINT NOT NULL, settled_at BIGINT,
            outcome TEXT, estimated INTEGER NOT NULL, reserved_prompt BIGINT NOT NULL,
            reserved_completion BIGINT NOT NULL, reserved_nano BIGINT, prompt_tokens BIGINT NOT NULL,
            cached_tokens BIGINT NOT NULL, completion_tokens BIGINT NOT NULL, nano BIGINT, currency TEXT)""",
        "CREATE INDEX ledger_day ON ledger (day)",
        "CREATE INDEX ledger_open ON ledger (instance) WHERE settled_at IS NULL",
        """CREATE TABLE balances (
            owner TEXT NOT NULL, period TEXT NOT NULL, tokens BIGINT NOT NULL, nano BIGINT NOT NULL,
            held_tokens BIGINT NOT NULL, held_nano BIGINT NOT NULL, PRIMARY KEY (owner, period))""",
    ),
    # 3: which version of a prompt a call used
    ("ALTER TABLE ledger ADD COLUMN prompt TEXT",),
)
