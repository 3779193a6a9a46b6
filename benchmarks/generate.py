"""Batch-1 decode of a 135M Llama shape (SmolLM2-135M, random weights): our engine against transformers' generate.

Both sides run the same weights (saved by us, loaded by transformers) on the same prompt, make the same number of tokens
greedily, and are timed whole: prefill, sampling, text and all. Before the clock starts, their fp32 tokens are compared.

    python benchmarks/generate.py --json
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import compare, finish, parser
from peers.ids import Ids

from soma.engine.engine import Engine
from soma.engine.params import SamplingParams
from soma.model.config import ModelConfig
from soma.model.hub import load_model, save_model
from soma.model.transformer import Transformer

os.environ["HF_HUB_OFFLINE"] = "1"
BAR = 1.5
SHAPE = ModelConfig(
    vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    intermediate_size=1536, max_position_embeddings=2048, tie_word_embeddings=True, rope_theta=100000.0,
)  # fmt: skip


def main() -> None:
    arguments = parser("generate", __doc__.splitlines()[0])
    arguments.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default 64)")
    arguments.add_argument("--tokens", type=int, default=64, help="tokens to make (default 64)")
    arguments.add_argument("--precision", nargs="*", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    prompt = torch.randint(SHAPE.vocab_size, (options.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Transformer(SHAPE), Path(folder))
        for precision in options.precision:
            cases += measure(Path(folder), precision, prompt, options)
    finish("generate", options, cases, packages=["transformers"])


def measure(folder: Path, precision: str, prompt: list[int], options: object) -> list:
    """Both sides at one precision."""
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    engine = Engine(load_model(folder, dtype), Ids(), max_length=2048)
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    made = {}

    def ours() -> float:
        start = time.perf_counter()
        made["ours"] = engine.generate(prompt, params).ids
        return options.tokens / (time.perf_counter() - start)

    def peer() -> float:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.inference_mode():
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.tokens, min_new_tokens=options.tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        made["theirs"] = out[0, len(prompt) :].tolist()
        assert len(made["theirs"]) == options.tokens
        return options.tokens / (time.perf_counter() - start)

    case = f"135M Llama {precision}, {options.prompt} in, {options.tokens} out, {options.threads} threads"
    cases = compare(case, "tokens/s", ours, {"transformers generate": peer}, bars={"transformers generate": BAR},
                    rounds=options.rounds, warmup=options.warmup)  # fmt: skip
    same = sum(a == b for a, b in zip(made["ours"], made["theirs"], strict=True))
    print(f"  same greedy tokens: {same} of {options.tokens}", file=sys.stderr)
    engine.close()
    return cases


if __name__ == "__main__":
    main()
