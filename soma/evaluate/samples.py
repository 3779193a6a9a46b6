"""What the model writes: continuations of given texts and of held-out documents, and answers to chat messages."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.engine.engine import Engine
from soma.engine.params import SamplingParams
from soma.evaluate.config import EvaluateConfig
from soma.evaluate.perplexity import separator_id
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer


@dataclass(frozen=True)
class Prompt:
    """What the model is given. `origin`: prompt, held-out or chat; `reference` is how the document went on."""

    origin: str
    text: str
    ids: list[int]
    reference: str | None = None
    source: str | None = None


def prompts_of(config: EvaluateConfig, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]) -> Iterator[Prompt]:
    """The prompts of the config, then the beginnings of held-out documents that are at least twice as long.

    A text begins after the separator, as in scoring; a chat prompt is rendered by the model's own template.
    """
    settings = config.samples
    separator = [separator_id(tokenizer)]
    for text in settings.prompts:
        yield Prompt("prompt", text, separator + tokenizer.encode(text))
    if tokenizer.has_chat_template:
        for text in settings.chat_prompts:
            yield Prompt("chat", text, tokenizer.encode_chat([{"role": "user", "content": text}], True))
    taken = 0
    for row in rows:
        if taken == settings.held_out:
            return
        ids = tokenizer.encode(row["text"][: 40 * (settings.prompt_tokens + settings.max_tokens)], as_text=True)
        if len(ids) >= 2 * settings.prompt_tokens:
            head, rest = ids[: settings.prompt_tokens], ids[settings.prompt_tokens :][: settings.max_tokens]
            yield Prompt("held-out", tokenizer.decode(head), separator + head, tokenizer.decode(rest), row["source"])
            taken += 1


def make_samples(
    config: EvaluateConfig, model: Transformer, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], path: Path
) -> None:
    """Write `samples.parquet`: each prompt with the model's continuation and how it was drawn, one after the other.

    A prompt is cut from the left where the model's context would not hold it with its continuation.
    """
    settings = config.samples
    prompts = list(prompts_of(config, tokenizer, rows))
    found = []
    engine = Engine(model, tokenizer, max_running=1)
    try:
        with progress.current().task("samples", len(prompts), "samples") as task:
            for index, prompt in enumerate(prompts):
                max_tokens = min(settings.max_tokens, engine.max_length - 1)
                params = SamplingParams(
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    max_tokens=max_tokens,
                    seed=config.seed + index,
                )
                answer = engine.generate(prompt.ids[-(engine.max_length - max_tokens) :], params)
                found.append(
                    asdict(prompt) | {
                        "continuation": answer.text, "tokens": len(answer.ids), "finish_reason": answer.finish_reason,
                        "temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": max_tokens,
                        "seed": config.seed + index,
                    }
                )  # fmt: skip
                task.advance()
    finally:
        engine.close()
    write_samples(path, found)


def write_samples(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """One Parquet file with a row a sample."""
    import pyarrow
    import pyarrow.parquet as pq

    text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    kinds = {
        "origin": text, "text": text, "continuation": text, "reference": text, "source": text, "finish_reason": text,
        "tokens": whole, "temperature": real, "top_p": real, "max_tokens": whole, "seed": whole,
    }  # fmt: skip
    columns = {name: pyarrow.array([sample[name] for sample in samples], kind) for name, kind in kinds.items()}
    columns["prompt"] = columns.pop("text")
    pq.write_table(pyarrow.table(columns), path, compression="zstd", store_schema=False)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of `samples.parquet`."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()
