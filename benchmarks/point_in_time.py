"""The point-in-time join of the feature store against Feast's own on the same Parquet file.

    SOMA_FEAST_ENV=FOLDER python benchmarks/point_in_time.py --json     # without the variable Feast is installed first

Every key has rows at distinct times, a fifth of them corrected later; every question is asked when something is known,
and no two are equal: what Feast's join loses elsewhere (docs/features.md) is not in here. Both read the file each time.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, Case, compare, finish, parser

from soma.serve.features import environment
from soma.serve.features.join import View, join

VIEW = View("v", ("key",), ("x",), "event", "created")
SIZES = {"20,000 rows, 5,000 questions": (2_000, 5_000), "200,000 rows, 50,000 questions": (20_000, 50_000)}
VERSIONS = 10
DAY = 86_400_000_000  # microseconds


def write(folder: Path, keys: int, questions: int) -> None:
    """rows, questions and what is right, by the join that the tests hold to an oracle."""
    draw = np.random.default_rng(0)
    key = np.repeat(np.arange(keys), VERSIONS)
    event = np.tile(np.arange(VERSIONS) * 100 * DAY, keys) + draw.integers(0, DAY, keys * VERSIONS)
    created = event + draw.integers(0, 9 * DAY, len(event))
    late = draw.random(len(event)) < 0.2
    key, event = np.concatenate([key, key[late]]), np.concatenate([event, event[late]])
    created = np.concatenate([created, created[late] + 20 * DAY])
    order = draw.permutation(len(key))
    times = pa.timestamp("us", "UTC")
    rows = pa.table({
        "key": key[order], "event": pa.array(event[order]).cast(times), "created": pa.array(created[order]).cast(times),
        "x": np.arange(len(key)),
    })  # fmt: skip
    asked = 40 * DAY + draw.integers(0, VERSIONS * 100 * DAY, questions)
    table = pa.table({
        "id": np.arange(questions), "key": draw.integers(0, keys, questions),
        "event_timestamp": pa.array(asked).cast(times),
    })  # fmt: skip
    pq.write_table(rows, folder / "rows.parquet")
    pq.write_table(table, folder / "questions.parquet")
    pq.write_table(join(table, rows, VIEW), folder / "expected.parquet")


def ours(folder: Path) -> float:
    """Seconds of one join."""
    questions = pq.read_table(folder / "questions.parquet")
    began = time.perf_counter()
    join(questions, pq.read_table(folder / "rows.parquet"), VIEW)
    return time.perf_counter() - began


def measured(case: str, keys: int, questions: int, rounds: int, warmup: int) -> list[Case]:
    """One size; says how much of Feast's answer is right."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, keys, questions)
        script = ROOT / "benchmarks" / "peers" / "feast_peer.py"
        command = [str(environment.python()), str(script), str(folder)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment.variables(),
        ) as peer:  # fmt: skip
            assert peer.stdin is not None
            assert peer.stdout is not None
            said: dict[str, float] = {}

            def theirs() -> float:
                print("join", file=peer.stdin, flush=True)
                while not (line := peer.stdout.readline()).startswith('{"seconds"'):
                    assert line, "Feast's process has ended"
                said.update(json.loads(line))
                return said["seconds"]

            cases = compare(case, "s", lambda: ours(folder), {"feast": theirs}, rounds=rounds, warmup=warmup,
                            higher_is_better=False)  # fmt: skip
            peer.stdin.close()
        print(f"{case}: Feast gave {said['rows']:,.0f} rows of {questions:,}, {said['right']:,.0f} of them right")
        return cases


def main() -> None:
    arguments = parser("point_in_time", "point-in-time join against Feast's", rounds=3).parse_args()
    cases = [case for name, (keys, questions) in SIZES.items()
             for case in measured(name, keys, questions, arguments.rounds, arguments.warmup)]  # fmt: skip
    finish("point_in_time", arguments, cases, ["pyarrow", "numpy"])


if __name__ == "__main__":
    main()
