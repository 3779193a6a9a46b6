"""The command line is thin: what is typed arrives, under its name, at the function that the command is for."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
from typer.testing import CliRunner

from soma.cli import app

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


class ArrivedError(Exception):
    """The function was called; nothing after it is of interest."""


def arguments(words: str, target: str, *beside: str) -> dict[str, Any]:
    """Run `soma WORDS` up to the call of `target` and give what it was called with, by the parameters' names.

    beside: functions on the way that do nothing.
    """
    module, _, name = target.rpartition(".")
    called = inspect.signature(getattr(import_module(module), name))
    found: dict[str, Any] = {}

    def arrive(*given: Any, **named: Any) -> None:
        found.update(called.bind(*given, **named).arguments)
        raise ArrivedError

    patches = [mock.patch(target, arrive), *(mock.patch(each) for each in beside)]
    for patch in patches:
        patch.start()
    try:
        result = CliRunner().invoke(app, words.split())
    finally:
        for patch in reversed(patches):
            patch.stop()
    assert isinstance(result.exception, ArrivedError), result.output or result.exception
    return found


GENERATE = "--seeds s.jsonl --url http://x --model m --out o --rows 1"
QDRANT = "soma.serve.retrieval.qdrant.QdrantStore"

CASES: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = [
    ("gateway g.yaml --host ::1 --port 1 --allow-public", "soma.serve.upstreams.server.serve_gateway", (),
     {"path": Path("g.yaml"), "host": "::1", "port": 1, "allow_public": True}),
    ("graph serve g.yaml --host ::1 --port 1 --grpc-port 2 --allow-model-control --keys k --prices p --limits l "
     "--admin-port 3 --admin-host ::2 --allow-public", "soma.serve.graphs.serve.serve_graphs", (),
     {"path": Path("g.yaml"), "host": "::1", "port": 1, "grpc_port": 2, "allow_control": True, "keys": "k",
      "prices": "p", "limits": Path("l"), "admin_port": 3, "admin_host": "::2", "allow_public": True}),
    ("index d --to q --collection c --qdrant-key k", QDRANT, (), {"to": "q", "collection": "c", "api_key": "k"}),
    ("index d --to q --encoder e --encoder-key k", "soma.serve.retrieval.encoders.load_encoder", (QDRANT,),
     {"reference": "e", "key": "k"}),
    ("index d --to q --chunk-tokens 5 --overlap 2 --text-field f", "soma.serve.retrieval.index.Cutting", (),
     {"chunk_tokens": 5, "overlap": 2, "text_field": "f"}),
    ("search i why --encoder e --collection c --qdrant-key k --encoder-key l --rerank r --rerank-key m",
     "soma.serve.retrieval.search.open_retriever", (),
     {"to": "i", "encoder": "e", "collection": "c", "api_key": "k", "encoder_key": "l", "rerank": "r",
      "rerank_key": "m"}),
    (f"run {QUICKSTART} --force --from corpus --to tokens --json --runs r", "soma.cli.recipes.execute", (),
     {"selection": {"first": "corpus", "last": "tokens", "force": True}, "as_json": True, "runs": Path("r")}),
    (f"recipe show {QUICKSTART} --all", "soma.recipe.to_yaml", (), {"only_set": False}),
    (f"train {QUICKSTART} --print-launch kubernetes --image i --nodes 2 --ranks-per-node 2 --no-gpus "
     "--set train.layout.fsdp=-1", "soma.train.parallel.launch.Launch", (),
     {"image": "i", "nodes": 2, "ranks_per_node": 2, "gpus": False}),
    ("sweep r.yaml --over a=1,2 --objective o --reduction 4 --seed 5 --runs r", "soma.sweep.search.Sweep", (),
     {"recipe": Path("r.yaml"), "over": ("a=1,2",), "objective": "o", "reduction": 4, "seed": 5, "runs": Path("r")}),
    ("chat m --temperature 0.5 --max-tokens 3 --seed 4", "soma.serve.terminal.chat", (),
     {"model_ref": "m", "temperature": 0.5, "max_tokens": 3, "seed": 4}),
    ("generate m f.jsonl --temperature 0.5 --top-p 0.6 --stop a --stop b --max-tokens 3 --seed 4",
     "soma.engine.params.SamplingParams", (),
     {"temperature": 0.5, "top_p": 0.6, "stop": ("a", "b"), "max_tokens": 3, "seed": 4}),
    ("generate m f.jsonl --device d --precision p --max-running 2 --weights int4 --speculate s --draft-tokens 3",
     "soma.engine.load.load_engine", (),
     {"model_ref": "m", "device": "d", "precision": "p",
      "options": {"max_running": 2, "max_waiting": 2, "weights": "int4", "speculate": "s", "draft_tokens": 3}}),
    ("data check f --schema kto", "soma.data.instruct.convert.check_file", (), {"source": "f", "schema": "kto"}),
    ("data show f --model m --row 2 --sequence-length 9", "soma.data.instruct.show.show", (),
     {"source": "f", "model": "m", "row": 2, "sequence_length": 9}),
    ("data quality --good a --good b --other c --out o --text-field f --seed 2", "soma.data.signals.linear.fit", (),
     {"good": ["a", "b"], "other": ["c"], "out": Path("o"), "text_field": "f", "seed": 2}),
    ("data packing t --length 8 --split validation --buffer 3", "soma.data.packed.waste_table", (),
     {"tokens": "t", "length": 8, "split": "validation", "buffers": [3]}),
    ("data annotations f --out o --to textgrid --task spans --out-offsets utf8 --short",
     "soma.data.annotation.files.write_records", ("soma.data.annotation.files.read_records",),
     {"path": Path("o"), "form": "textgrid", "task": "spans", "offsets": "utf8", "short": True}),
    ("data agreement a b --task intent --from doccano", "soma.data.annotation.files.read_records", (),
     {"path": Path("a"), "form": "doccano", "task": "intent"}),
    ("data agreement a b --level ordinal", "soma.data.annotation.agreement.agreement",
     ("soma.data.annotation.files.read_records", "soma.data.annotation.agreement.align"), {"level": "ordinal"}),
    ("data agreement a b --show 3", "soma.data.annotation.agreement.shown",
     ("soma.data.annotation.files.read_records", "soma.data.annotation.agreement.align",
      "soma.data.annotation.agreement.agreement"), {"items": 3}),
    ("data annotate f --out o --labels a,b --relation-labels c,d --work relations --to doccano --annotator e",
     "soma.serve.annotate.session.Session", (),
     {"source": Path("f"), "out": Path("o"), "work": "relations", "labels": ["a", "b"], "relation_labels": ["c", "d"],
      "form": "doccano", "annotator": "e"}),
    ("data embed c --url u --model m --out o --api-key-env K --max-chars 5 --batch 6 --concurrency 7",
     "soma.data.config.SemanticConfig", (),
     {"url": "u", "model": "m", "api_key_env": "K", "max_chars": 5, "batch": 6, "concurrency": 7}),
    ("data embed c --url u --model m --out o --text-field f", "soma.data.embed.embed_corpus", (),
     {"corpus": "c", "out": Path("o"), "text_field": "f"}),
    ("data report a b --no-near", "soma.data.profile.report.data_report", (), {"a": ["a"], "b": ["b"], "near": False}),
    ("data report a --text-field f --label l --label m --no-bias --workers 2 --runner ray",
     "soma.data.profile.scan.Options", (),
     {"text_field": "f", "labels": ("l", "m"), "bias": False, "workers": 2, "runner": "ray"}),
    ("data report a --scorer words:w", "soma.data.signals.scorers.open_scorer", (), {"address": "words:w"}),
    (f"data generate self-instruct {GENERATE} --api-key-env K --temperature 0.5 --max-tokens 6 --seed 7 "
     "--decontaminate d --concurrency 9 --novelty 0.4", "soma.data.instruct.generate.settings.Settings", (),
     {"method": "self-instruct", "api_key_env": "K", "temperature": 0.5, "max_tokens": 6, "seed": 7,
      "decontaminate": ("d",), "concurrency": 9, "novelty": 0.4}),
    (f"data generate evol-instruct {GENERATE} --epochs 2 --temperature 0.5",
     "soma.data.instruct.generate.settings.Settings", (),
     {"method": "evol-instruct", "epochs": 2, "temperature": 0.5}),
    (f"data generate evol-instruct {GENERATE} --budget-requests 2 --budget-tokens 3 --budget-money 4 --price-in 5 "
     "--price-out 6", "soma.data.instruct.generate.settings.Budget", (),
     {"requests": 2, "tokens": 3, "money": Decimal(4), "price_in": Decimal(5), "price_out": Decimal(6)}),
    ("tokenizer compare t --on n=p --text-field f", "soma.data.tokenizer_compare.read_texts",
     ("soma.data.tokenizer_compare.load",), {"sources": ["n=p"], "text_field": "f"}),
    ("ledger report --by team --since 2026-01-01 --until 2026-01-02", "soma.serve.ledger.report.report",
     ("soma.serve.database.Database",), {"by": ["team"], "since": "2026-01-01", "until": "2026-01-02"}),
    ("features materialize r --view a --view b --at 1970-01-01T00:01", "soma.serve.features.repo.materialize", (),
     {"folder": Path("r"), "views": ["a", "b"], "at": 60.0}),
    ("features get v:f --repo r --entities e --out o --at t --full-names", "soma.serve.features.repo.historical_file",
     (), {"folder": Path("r"), "entities": Path("e"), "out": Path("o"), "at": "t", "full_names": True}),
    ("prompt test p --url u --model m --key k --parallel 7", "soma.serve.templates.score.run_tests",
     ("soma.cli.prompts.library_of",), {"reference": "p", "url": "u", "model": "m", "key": "k", "parallel": 7}),
    ("runs prune --runs r --keep 2 --dry-run", "soma.base.runs.prune", (),
     {"runs": Path("r"), "keep": 2, "dry_run": True}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "target", "beside", "expected"), CASES, ids=[case[0][:40] for case in CASES])
def test_options_arrive(words: str, target: str, beside: tuple[str, ...], expected: dict[str, Any]) -> None:
    found = arguments(words, target, *beside)
    assert {name: found[name] for name in expected} == expected


def test_short_forms_of_recipe_values() -> None:
    recipe = arguments(f"run {QUICKSTART} --runner ray --workers 2", "soma.cli.recipes.execute")["recipe"]
    assert (recipe.data.runner, recipe.data.workers) == ("ray", 2)


def test_an_indexs_signatures() -> None:
    found = arguments("data index c --out o --num-hashes 64 --ngram 3", "soma.data.dedup.against.add_to_index")
    assert (found["config"].num_hashes, found["config"].ngram) == (64, 3)


def test_every_option_of_serve_arrives() -> None:
    from soma.serve.options import ServeOptions

    words = (
        "serve m --host ::1 --port 1 --name n --precision fp32 --device cpu --max-length 2 --max-running 3 "
        "--max-waiting 4 --weights int8 --cache-dtype int8 --speculate ngram --draft-tokens 5 --replicas 6 "
        "--tensor-parallel 7 --pipeline-parallel 8 --adapter a=b --allow-adapter-loading --allow-public --keys k "
        "--grpc-port 9 --grpc-compression gzip --models f --allow-model-control --limits l --trusted-proxy ::2 "
        "--prices p --durability power --admin-port 10 --admin-host ::3 --prompts q --request-log r "
        "--request-log-sample 0.5 --request-log-raw --request-log-seconds 11 --index i --rerank s"
    )
    expected = ServeOptions(
        host="::1", port=1, name="n", precision="fp32", device="cpu", max_length=2, max_running=3, max_waiting=4,
        weights="int8", cache_dtype="int8", speculate="ngram", draft_tokens=5, replicas=6, tensor_parallel=7,
        pipeline_parallel=8, adapters={"a": "b"}, allow_adapter_loading=True, allow_public=True, keys="k", grpc_port=9,
        grpc_compression="gzip", models=Path("f"), allow_model_control=True, limits=Path("l"), trusted_proxies=["::2"],
        prices="p", durability="power", admin_port=10, admin_host="::3", prompts="q", request_log=Path("r"),
        request_log_sample=0.5, request_log_redact=False, request_log_seconds=11.0, index="i", rerank="s",
    )  # fmt: skip
    found = arguments(words, "soma.serve.server.serve")
    assert (found["model_ref"], found["options"]) == ("m", expected)
    usual = ServeOptions()
    same = {each.name for each in fields(usual) if getattr(expected, each.name) == getattr(usual, each.name)}
    assert same == {"in_process", "grace"}  # the one needs replicas 1, the other is no option
    assert arguments("serve m --in-process", "soma.serve.server.serve")["options"] == ServeOptions(in_process=True)
    assert arguments("serve m", "soma.serve.server.serve")["options"] == usual


def test_keys_and_budgets(tmp_path: Path) -> None:
    from soma.serve.database import Database
    from soma.serve.keys.store import KeyStore

    database = str(tmp_path / "keys.db")
    for words in (
        "create n --priority 5 --admin", "create m --team t --model a* --route /v1/* --days 2",
        "budget team:t --period day --tokens 7",
    ):  # fmt: skip
        result = CliRunner().invoke(app, ["keys", *words.split(), "--database", database])
        assert result.exit_code == 0, result.output
    store = KeyStore(Database(database))
    admin, user = store.all()
    assert (admin.name, admin.role, admin.priority) == ("n", "admin", 5)
    assert (user.role, user.team, list(user.models or ()), list(user.routes or ())) == ("use", "t", ["a*"], ["/v1/*"])
    assert user.expires_at is not None
    assert [(each.owner, each.period, each.tokens) for each in store.budgets()] == [("team:t", "day", 7)]


def options(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Every command with each of its options, in all the ways in which it can be written."""
    for name, below in getattr(command, "commands", {}).items():
        yield from options(below, (*path, name))
    if not hasattr(command, "commands"):
        for parameter in (each for each in command.params if not getattr(each, "hidden", False)):
            names = [each for each in (*parameter.opts, *parameter.secondary_opts) if each.startswith("--")]
            if names:
                yield " ".join(path), names


def test_no_option_without_a_test() -> None:
    texts = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
    typed = set(re.findall(r"--[a-z][a-z0-9-]*", texts))
    every = list(options(typer.main.get_command(app)))
    assert len(every) > 300
    assert [f"{command} {names[0]}" for command, names in every if not typed.intersection(names)] == []
