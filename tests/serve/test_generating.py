"""Instruction data made with our own server: the model is a toy, what counts is that nothing is lost or paid twice."""

import json
from pathlib import Path

import pytest

from soma.data.instruct.generate.output import generate
from soma.data.instruct.generate.settings import Budget, Settings


@pytest.mark.parametrize("method", ["self-instruct", "evol-instruct"])
def test_generation_from_our_own_server(service_url: str, tmp_path: Path, method: str) -> None:
    seeds = tmp_path / "seeds.jsonl"
    rows = [{"instruction": f"Name {i} rivers.", "input": "", "output": "Rhine"} for i in range(4)]
    seeds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    budget = Budget(requests=9)
    given = Settings(method, "tiny", service_url, round=3, max_tokens=12, concurrency=3, budget=budget)  # type: ignore[arg-type]
    out = tmp_path / "out"
    report = generate(str(seeds), given, out)
    assert report["spent"]["answers"] + report["spent"]["refused"] == report["spent"]["requests"] <= 9
    assert report["spent"]["tokens_out"] > 0
    assert generate(str(seeds), given, out) == report
    for line in (out / "rows.jsonl").read_text().splitlines():
        assert json.loads(line)["provenance"]["url_host"] in service_url
