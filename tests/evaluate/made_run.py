"""A run's folder as a quickstart leaves it, with made-up but likely figures: what the report is tested on."""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

from soma.base.artefact import write_json
from soma.evaluate.samples import write_samples

EVIL = '<script>alert("x")</script>'
RECIPE = """# From text to a served model
name: quickstart
description: A small Llama on the Python standard library
data:
  sources: ["stdlib:"]
train:
  steps: 400   # at most
  learning_rate: 6.0e-3
"""
SECONDS = {
    "corpus": 14.2,
    "tokenizer": 1.9,
    "tokens": 4.4,
    "train": 219.0,
    "instruct": 2.3,
    "instruct_tokens": 1.1,
    "tune": 44.8,
    "evaluate": 17.5,
    "evaluate_tuned": 16.9,
    "probe": 12.2,
}
INPUTS = {
    "tokenizer": {"corpus": "corpus"},
    "tokens": {"corpus": "corpus", "tokenizer": "tokenizer"},
    "train": {"tokens": "tokens", "tokenizer": "tokenizer"},
    "instruct": {"corpus": "corpus"},
    "instruct_tokens": {"pairs": "instruct", "tokenizer": "tokenizer"},
    "tune": {"model": "train", "tokens": "instruct_tokens", "tokenizer": "tokenizer"},
    "evaluate": {"model": "train", "corpus": "corpus", "instruct": "instruct_tokens"},
    "evaluate_tuned": {"model": "tune", "corpus": "corpus", "instruct": "instruct_tokens"},
    "probe": {"model": "tune"},
}


def key(stage: str) -> str:
    """A stage's key: any sixteen hex digits."""
    return hashlib.sha256(stage.encode()).hexdigest()[:16]


def lengths(middle: float) -> dict[str, Any]:
    """A histogram as the corpus report writes it."""
    edges = [1 << power for power in range(4, 20)]
    center = math.log2(middle)
    counts = [round(900 * math.exp(-((math.log2(edge) - center) ** 2) / 6)) for edge in edges[:-1]]
    return {"edges": edges, "counts": counts, "median": middle, "p90": middle * 4, "max": edges[-1] - 1}


def corpus_report() -> dict[str, Any]:
    """`corpus/report.json`."""
    sizes = [("read", 1610, 14.1e6), ("clean", 1544, 13.9e6), ("exact", 1498, 13.5e6), ("near", 1466, 13.2e6)]
    kinds = {"py": 11.1e6, "txt": 1.3e6, "rst": 0.5e6, "html": 0.2e6, "md": 0.1e6}
    long = "Lib/site-packages/" + "a_package_with_a_very_long_name/" * 5 + "module.py"
    return {
        "python": "3.11.7",
        "corpus_hash": "1a2b3c4d5e6f" + "0" * 52,
        "steps": [{"step": step, "documents": count, "bytes": int(size)} for step, count, size in sizes],
        "splits": {
            "train": {"documents": 1391, "bytes": 12_540_000, "chars": 12_490_000, "lines": 371_000},
            "validation": {"documents": 75, "bytes": 660_000, "chars": 657_000, "lines": 19_800},
        },
        "document_chars": lengths(4600),
        "line_bytes": lengths(60),
        "characters": {
            "letters": 8.2e6,
            "spaces": 3e6,
            "punctuation": 1.4e6,
            "line_ends": 4e5,
            "digits": 3e5,
            "cjk": 9e4,
        },
        "kinds": {kind: {"documents": int(size / 9e3), "bytes": int(size)} for kind, size in kinds.items()},
        "sources": [{"source": f"Lib/module{n}.py", "documents": 1, "bytes": 300_000 - 9000 * n} for n in range(20)],
        "dropped": [
            {
                "reason": "near_duplicate",
                "count": 32,
                "examples": [
                    {"source": long, "detail": f"like {long}", "excerpt": EVIL + "\ndef main() -> None:\n    pass"}
                ],
            },
            {
                "reason": "too_short",
                "count": 66,
                "examples": [{"source": "Lib/empty/__init__.py", "detail": "0 characters", "excerpt": ""}],
            },
        ],
        "near_duplicates": {
            "threshold": 0.8,
            "straddle_threshold": 0.7,
            "bands": 32,
            "rows": 4,
            "candidates": 210,
            "sizes": {"2": 20},
            "group_sizes": {"2": 31},
            "examples": [
                {
                    "kept": "Lib/encodings/cp1250.py",
                    "dropped": ["Lib/encodings/cp1251.py"],
                    "jaccard": 0.93,
                    "excerpt": '""" Python Character Mapping Codec\n"""\n\nimport codecs',
                }
            ],
        },
        "contamination": {
            "action": "drop",
            "documents": 3,
            "sets": [{"set": "mmlu/test.jsonl.gz", "fields": 12_800, "found": 2}],
            "examples": [
                {
                    "source": long,
                    "set": "mmlu/test.jsonl.gz",
                    "item": 17,
                    "field": "question",
                    "match": "near",
                    "n_windows": 9,
                    "overlap": 0.82,
                    "item_text": EVIL,
                    "document_text": EVIL,
                }
            ],
        },
        "repeated_text": {
            "unit": "words",
            "length": 50,
            "action": "remove",
            "documents": 12,
            "spans": 14,
            "units": 900,
            "bytes": 5600,
            "examples": [{"source": long, "left": EVIL, "characters": 431}],
        },
        "repeated_lines": {
            "in_documents": 10,
            "action": "remove",
            "distinct": 3,
            "documents": 40,
            "lines": 77,
            "bytes": 2900,
            "examples": [{"line": EVIL, "documents": 31}],
        },
    }


def write_training(out: Path, steps: int, start: float, end: float, seed: int) -> None:
    """`logs/metrics.jsonl` and `logs/summary.json` of a training stage."""
    noise = random.Random(seed)
    logs = out / "logs"
    logs.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-step / (steps / 6)) + noise.gauss(0, 0.05)
        rate = 6e-3 * min(1, step / (steps * 0.05), (steps - step) / (steps * 0.4))
        record = {
            "event": "train",
            "step": step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": abs(noise.gauss(0.6, 0.1)),
            "tokens": step * 4096,
            "tokens_per_second": 10_700 + noise.gauss(0, 150),
            "mfu": 0.33 + noise.gauss(0, 0.01),
            "peak_memory_bytes": 1_400_000_000,
            "seconds": step * 0.38,
        }
        lines.append(json.dumps(record))
        if step % (steps // 5) == 0:
            lines.append(json.dumps({"event": "evaluate", "step": step, "validation_loss": loss + 0.06}))
    lines.append(json.dumps({"event": "note", "step": steps, "text": f"{steps} steps in place of {steps * 2}"}))
    (logs / "metrics.jsonl").write_text("\n".join(lines) + '\n{"event": "train", "st')  # a line that a kill cut off
    summary = {
        "steps": steps,
        "planned_steps": steps * 2,
        "tokens": steps * 4096,
        "loss": end,
        "validation_loss": end + 0.06,
        "parameters": 4_100_000,
        "flops_per_token": 2.7e7,
        "seconds": steps * 0.38,
        "tokens_per_second": 10_700,
        "matmul_peak": 8.8e11,
        "mfu": 0.33,
        "peak_memory_bytes": 1_400_000_000,
    }
    write_json(logs / "summary.json", summary)


def write_evaluation(out: Path, bits: float, tuned: bool) -> None:
    """`scores.json`, `samples.parquet` and `logs/timing.json`."""
    out.mkdir()
    kinds = {"py": (bits - 0.05, 560_000), "txt": (bits + 0.4, 70_000), "rst": (bits + 0.6, 30_000)}
    scores = {
        "documents": 75,
        "bytes": 660_000,
        "tokens": 181_000,
        "bytes_per_token": 3.65,
        "perplexity": 14.1,
        "measured": 1.0,
        "bits_per_byte": {"value": bits, "low": bits - 0.04, "high": bits + 0.04, "level": 0.95, "resamples": 1000},
        "kinds": {
            kind: {"documents": 9, "bytes": size, "bits_per_byte": value} for kind, (value, size) in kinds.items()
        },
        "baselines": {
            "gzip": {"bytes": 163_350, "bits_per_byte": 1.98},
            "xz": {"bytes": 136_200, "bits_per_byte": 1.651},
        },
        "answers": {"conversations": 40, "tokens": 3100, "nats_per_token": 1.2 if tuned else 2.9, "perplexity": 3.3},
        "window": {"sequence_length": 512, "stride": 256, "separator_id": 0},
        "precision": "bf16",
        "parameters": 4_100_000,
        "token_ids_hash": "ab" * 32,
        "model_hash": "cd" * 32,
        "corpus_hash": "1a2b3c4d5e6f" + "0" * 52,
        "python": "3.11.7",
    }
    write_json(out / "scores.json", scores)
    points = [[0.0, 0.1], [0.5, -0.2], [-0.5, 0.1]]
    write_json(out / "words.json", {"words": ["return", "<self>", "None"], "points": points, "shares": [0.4, 0.2]})
    code = "    with open(path) as file:\n        return file.read().splitlines()\n" * (1 if tuned else 3)
    drawn = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 96, "seed": 1, "tokens": 61, "finish_reason": "length"}
    more: dict[str, Any] = {"reference": None, "source": None}
    samples = [
        {"origin": "prompt", "text": "def read_lines(path):\n", "continuation": code + EVIL, **more, **drawn},
        {
            "origin": "chat",
            "text": "Write a function that adds two numbers.",
            "continuation": "x" * 400,
            **more,
            **drawn,
        },
        {
            "origin": "held-out",
            "text": "import os\n\nclass Path",
            "continuation": ':\n    """A path."""\n',
            "reference": 'Like:\n    """Anything with __fspath__."""\n',
            "source": "Lib/pathlib.py",
            **drawn,
        },
    ]
    write_samples(out / "samples.parquet", samples)
    (out / "logs").mkdir()
    write_json(out / "logs" / "timing.json", {"tokens_per_second": 21_000, "seconds": 17})


def probe_report() -> dict[str, Any]:
    """What `soma.serve.probe` returns."""
    noise = random.Random(5)
    rows: list[dict[str, Any]] = []
    for number in range(6):
        answer = 'def add(a, b):\n    """Return the sum."""\n    return a + b' if number else EVIL
        rows.append(
            {
                "prompt": f"Write a Python function that returns the sum of {number + 2} numbers.",
                "answer": answer,
                "finish_reason": "stop",
                "error": None,
                "ttft_seconds": 0.02 + noise.random() / 50,
                "itl_seconds": 0.004 + noise.random() / 900,
                "e2e_seconds": 0.3 + noise.random() / 3,
                "prompt_tokens": 21,
                "completion_tokens": 60,
                "tokens_per_second": 180,
            }
        )
    rows.append({**rows[0], "answer": "", "error": "APIError: overloaded", "ttft_seconds": None, "itl_seconds": None})
    return {
        "model": "quickstart",
        "chat": True,
        "concurrency": 2,
        "max_tokens": 96,
        "temperature": 0.0,
        "seconds": 2.1,
        "requests": rows,
        "succeeded": 6,
        "failed": 1,
        "completion_tokens": 360,
        "tokens_per_second": 171.0,
        "percentiles": {"ttft_seconds": {"p50": 0.031, "p90": 0.04, "p99": 0.04, "mean": 0.03}},
    }


def make_run(runs: Path) -> tuple[Path, dict[str, Path]]:
    """Write the run; its folder, and the artefact of each stage."""
    folder = runs / "quickstart"
    folder.mkdir(parents=True)
    artefacts = {stage: runs / "store" / f"{stage}-{key(stage)}" for stage in SECONDS}
    for stage in ("corpus", "tokens", "instruct"):
        artefacts[stage].mkdir(parents=True)
    write_json(artefacts["corpus"] / "report.json", corpus_report())
    split = {"tokens": 3_440_000, "documents": 1391, "bytes": 12_540_000, "shards": []}
    write_json(
        artefacts["tokens"] / "index.json", {"splits": {"train": split, "validation": split | {"tokens": 181_000}}}
    )
    pairs = {
        "splits": {"train": {"samples": 5100, "bytes": 2_900_000}, "validation": {"samples": 240, "bytes": 130_000}}
    }
    write_json(
        artefacts["instruct"] / "report.json", pairs | {"prompt_chars": lengths(90), "answer_chars": lengths(300)}
    )
    write_training(artefacts["train"], 580, 8.3, 2.3, seed=1)
    write_training(artefacts["tune"], 100, 2.9, 1.4, seed=2)
    write_evaluation(artefacts["evaluate"], 1.548, tuned=False)
    write_evaluation(artefacts["evaluate_tuned"], 1.571, tuned=True)
    (artefacts["probe"] / "logs").mkdir(parents=True)
    write_json(artefacts["probe"] / "logs" / "probe.json", probe_report())
    record = {
        "name": "quickstart",
        "started": "2026-11-23T21:00:05+00:00",
        "status": "running",
        "recipe": {"description": "A small Llama on the Python standard library"},
        "versions": {"soma": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "numpy": "2.3.4", "tokenizers": "0.22.1"},
        "stages": [
            {
                "stage": stage,
                "key": key(stage),
                "cached": stage in ("corpus", "tokenizer"),
                "seconds": seconds,
                "peak_memory_bytes": 400_000_000 + 8_000_000 * seconds,
                "bytes": 17_000_000,
                "content_hash": "ef" * 32,
                "reproducible": "latencies are measured" if stage == "probe" else True,
                "inputs": {role: key(name) for role, name in INPUTS.get(stage, {}).items()},
            }
            for stage, seconds in SECONDS.items()
        ],
    }
    write_json(folder / "run.json", record)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder, artefacts
