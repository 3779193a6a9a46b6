"""Speculation by n-grams: our engine with it against our engine without it, on texts that repeat and one that does not.

The model has the shape of SmolLM2-135M and costs what that costs, but its layers add nothing: the output row of a token
is the embedding of the token before it in a fixed cycle, so greedy answers go round this cycle and repeat after as many
tokens as it has. Sampling leaves the cycle now and then, which makes guesses wrong. Speculation must pay where text
repeats, and cost nothing where it does not, or where the batch is too large.

    python benchmarks/speculate.py --json
"""

import sys
import time
from typing import Any

import torch
from common import Case, compare, finish, parser
from peers.ids import Ids

from soma.engine.engine import Engine
from soma.engine.params import SamplingParams
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer

SHAPE = ModelConfig(
    vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    intermediate_size=1536, max_position_embeddings=2048, tie_word_embeddings=False, rope_theta=100000.0,
)  # fmt: skip
PROMPT = 64
# name, tokens of the cycle, requests, tokens of each, temperature, bar
CASES = (
    ("repeats, alone", 48, 1, 96, 0.0, 1.3),
    ("repeats with mistakes, alone", 48, 1, 96, 1.35, 1.0),
    ("never repeats, alone", 12000, 1, 48, 0.0, 0.95),
    ("repeats, 16 requests", 48, 16, 24, 0.0, 0.95),
    ("repeats, 64 requests", 48, 64, 24, 0.0, 0.95),
)


def cyclic(length: int, device: str) -> Transformer:
    """The model whose text repeats after `length` tokens."""
    model = Transformer(SHAPE, dtype=torch.bfloat16).eval()
    assert model.lm_head is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        rows_VD = model.embed_tokens.weight
        rows_VD.normal_(generator=torch.Generator().manual_seed(0))
        after_V = torch.arange(SHAPE.vocab_size)
        after_V[:length] = after_V[:length].roll(-1)
        model.lm_head.weight[after_V] = (
            rows_VD / SHAPE.hidden_size * 16
        )  # logits: 16 for the next, about 0.7 for others
    return model.to(device)


def measure(
    name: str, length: int, requests: int, tokens: int, temperature: float, bar: float, options: Any
) -> list[Case]:
    """One case: both engines on the same requests."""
    engines = {
        kind: Engine(
            cyclic(length, options.device), Ids(), max_length=512, prefix_cache=False, cache_tokens=512 * requests,
            speculate=kind,
        )
        for kind in ("ngram", None)
    }  # fmt: skip
    prompts = [[(7 * r + i) % length for i in range(PROMPT)] for r in range(requests)]
    params = [
        SamplingParams(temperature=temperature, seed=r, max_tokens=tokens, ignore_eos=True) for r in range(requests)
    ]
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    made: dict[str | None, list[list[int]]] = {}

    def run(kind: str | None) -> float:
        start = clock()
        made[kind] = [request.result().ids for request in engines[kind].submit_all(prompts, params)]
        return requests * tokens / (clock() - start)

    where = f"{options.threads} threads" if options.device == "cpu" else options.device
    title = f"135M Llama bf16, {name}: {requests} × {PROMPT} in, {tokens} out, {where}"
    cases = compare(title, "tokens/s", lambda: run("ngram"), {"without speculation": lambda: run(None)},
                    bars={"without speculation": bar}, rounds=options.rounds, warmup=options.warmup)  # fmt: skip
    figures = engines["ngram"].stats()
    same = sum(a == b for a, b in zip(made["ngram"], made[None], strict=True))
    drafted, accepted = figures["draft_tokens"], figures["accepted_tokens"]
    print(f"  drafted {drafted:.0f}, accepted {accepted:.0f}; same answers: {same} of {requests}", file=sys.stderr)
    for engine in engines.values():
        engine.close()
    return cases


def main() -> None:
    arguments = parser("speculate", (__doc__ or "").splitlines()[0], rounds=5)
    arguments.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    arguments.add_argument("--cpu-seconds", action="store_true",
                           help="CPU seconds of the process, for a busy machine (with --threads 1)")  # fmt: skip
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    cases = []
    for case in CASES:
        cases += measure(*case, options)
    finish("speculate", options, cases)


if __name__ == "__main__":
    main()
