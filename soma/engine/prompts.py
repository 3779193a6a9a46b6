"""From plain prompts to token ids, and answers to many prompts in their order."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from soma.base import progress
from soma.engine.errors import QueueFullError, RequestError
from soma.engine.params import MASK64, SamplingParams
from soma.engine.request import Completion, Request
from soma.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from soma.engine.engine import Engine

Prompt = str | Sequence[int]


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer puts a begin-of-text token before plain text, as its own settings say."""
    ids = tokenizer.inner.encode("a", add_special_tokens=True).ids
    return tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a plain prompt. An empty one becomes the token that begins (or ends) texts; RequestError if none does."""
    ids = tokenizer.encode(text)
    if begins_with_bos(tokenizer):
        assert tokenizer.bos_id is not None
        return [tokenizer.bos_id, *ids]
    if ids:
        return ids
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else list(tokenizer.eos_ids[:1])
    if not start:
        raise RequestError("the prompt is empty, and this model has no token that begins a text", "prompt")
    return start


def ids_of(engine: "Engine", prompt: Prompt) -> Sequence[int]:
    """A prompt as ids."""
    if not isinstance(prompt, str):
        return prompt
    assert isinstance(engine.tokenizer, Tokenizer), "text needs a tokenizer with a vocabulary"
    return encode_prompt(engine.tokenizer, prompt)


def answer_all(
    engine: "Engine", prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None,
    adapter: str | None = None,
) -> list[Completion]:  # fmt: skip
    """The answers to prompts, in their order; the engine always has as many of them as it has places for.

    params: for all prompts (with a seed, prompt k draws from seed + k), or one for each. Progress is reported. Raises
    RequestError with the prompt's place before anything runs, QueueFullError if others have taken every place.
    """
    base = params if isinstance(params, SamplingParams) else SamplingParams()
    each = list(params) if isinstance(params, Sequence) else [
        base if base.seed is None else replace(base, seed=(base.seed + place) & MASK64) for place in range(len(prompts))
    ]  # fmt: skip
    if len(each) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts and {len(each)} sampling parameters", "params")
    texts = []
    for place, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
        try:
            texts.append(ids_of(engine, prompt))
            engine.check(texts[-1], one)
        except RequestError as error:
            raise RequestError(f"prompt {place}: {error}", error.param, error.code) from None
    open_: deque[Request] = deque()
    made: list[Completion] = []
    try:
        with progress.current().task("generate", len(prompts), "prompts") as task:
            for ids, one in zip(texts, each, strict=True):
                while True:
                    try:
                        open_.append(engine.submit(ids, one, adapter=adapter))
                        break
                    except QueueFullError:
                        if not open_:
                            raise
                        made.append(open_.popleft().result())
                        task.advance()
            while open_:
                made.append(open_.popleft().result())
                task.advance()
    finally:  # interrupted: leave nothing running
        for request in open_:
            request.cancel()
    return made
