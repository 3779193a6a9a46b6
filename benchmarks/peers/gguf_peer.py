"""llama.cpp as a peer of `benchmarks/engine.py`: through llama-cpp-python's low-level API, ids in, ids out.

Runs in an environment of its own (`pip install llama-cpp-python gguf`), as a worker process: see `worker.py`.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from safetensors.numpy import load_file
from worker import answer_requests

FORMATS = {
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama's query or key matrix in GGUF's order: rotary pairs side by side instead of in halves."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def convert(folder: Path, out: Path) -> None:
    """A Hugging Face folder of a Llama or Qwen3 with float32 weights as GGUF, with made-up words: ids go in and out."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    assert family in ("llama", "qwen3"), family
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(out), family)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in load_file(str(folder / "model.safetensors")).items():
        tensor = tensor.astype(np.float32)
        stem = name.removeprefix("model.").removesuffix(".weight")
        if stem == "embed_tokens":
            target = "token_embd"
        elif stem == "norm":
            target = "output_norm"
        elif stem == "lm_head":
            target = "output"
        else:
            _, layer, part = stem.split(".", 2)
            target = f"blk.{layer}.{NAMES[part]}"
            if family == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                tensor = interleave(tensor, heads if part.endswith("q_proj") else kv_heads)
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, name: str) -> None:
    """All matrices, the output's too, in one format (`pure`): the same as ours."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = FORMATS[name], True, 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not write {out}")


class LlamaCpp:
    """A model and a context for up to `sequences` sequences."""

    def __init__(self, path: str, threads: int, length: int, sequences: int) -> None:
        llama_cpp.llama_backend_init()
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, None)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * sequences, sequences
        params.n_batch, params.n_ubatch = max(2048, sequences), 512
        params.n_threads = params.n_threads_batch = threads
        self.limit = params.n_batch
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(self.limit, 0, 1)

    def run(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, wanted) rows; greedy tokens of the wanted ones."""
        chosen = []
        for start in range(0, len(rows), self.limit):
            part = rows[start : start + self.limit]
            self.batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, position, 1
                self.batch.seq_id[i][0], self.batch.logits[i] = sequence, wanted
            if llama_cpp.llama_decode(self.context, self.batch):
                raise RuntimeError("llama_decode failed")
            for i, row in enumerate(part):
                if row[3]:
                    logits = llama_cpp.llama_get_logits_ith(self.context, i)
                    chosen.append(int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax()))
        return chosen

    def generate(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """`count` greedy tokens after each prompt, all sequences in one batch: seconds of prefill and of decode."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        rows = [
            (token, position, sequence, position == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        ids = [[token] for token in self.run(rows)]
        first = time.perf_counter()
        for step in range(count - 1):
            rows = [(made[-1], len(prompts[s]) + step, s, True) for s, made in enumerate(ids)]
            for made, token in zip(ids, self.run(rows), strict=True):
                made.append(token)
        return {"prefill": first - start, "decode": time.perf_counter() - first, "ids": ids}


def main() -> None:
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    if sys.argv[1] == "quantize":
        quantize(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    path, threads, length, sequences = sys.argv[1], *map(int, sys.argv[2:5])
    peer = LlamaCpp(path, threads, length, sequences)
    answer_requests({"generate": peer.generate})


if __name__ == "__main__":
    main()
