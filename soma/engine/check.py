"""What a request may ask for, checked before anything runs. The same check serves an engine in this process and a
front whose engine is in another one, so that bad input never reaches an engine."""

from collections.abc import Sequence

from soma.engine.errors import RequestError
from soma.engine.params import SamplingParams


def check_ids(prompt_ids: Sequence[int], vocab_size: int, field: str = "prompt") -> None:
    """Raises RequestError for no tokens at all and for ids that the model does not have."""
    if not prompt_ids:
        raise RequestError(f"the {field} has no tokens", field)
    if (low := min(prompt_ids)) < 0 or (high := max(prompt_ids)) >= vocab_size:
        bad = low if low < 0 else high
        raise RequestError(f"token id {bad} is outside the vocabulary (0 to {vocab_size - 1})", field)


def check_embeddable(ids: Sequence[int], vocab_size: int, max_length: int) -> None:
    """Raises RequestError that names `input`: no ids, too many, or ids that the model does not have."""
    check_ids(ids, vocab_size, "input")
    if len(ids) > max_length:
        raise RequestError(
            f"the input has {len(ids)} tokens, at most {max_length} are possible", "input", "context_length_exceeded"
        )


def check_request(prompt_ids: Sequence[int], params: SamplingParams, vocab_size: int, max_length: int) -> int:
    """Refuse what can never run, with the field's name; gives the most tokens that the request may make.

    Raises RequestError: prompt empty, too long for the context, ids outside the vocabulary, max_tokens too large.
    """
    check_ids(prompt_ids, vocab_size)
    params.check_vocabulary(vocab_size)
    room = max_length - len(prompt_ids)
    if room < 1:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens, the context holds {max_length} with the answer; "
            "shorten the prompt", "prompt", "context_length_exceeded",
        )  # fmt: skip
    if params.max_tokens is not None and params.max_tokens > room:
        raise RequestError(
            f"max_tokens is {params.max_tokens}, but the prompt has {len(prompt_ids)} tokens and the context holds "
            f"{max_length}: at most {room} are left", "max_tokens", "context_length_exceeded",
        )  # fmt: skip
    return params.max_tokens or room
