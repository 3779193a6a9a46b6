"""What checks find in a text, whole or as it comes."""

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

import numpy as np

from soma.data.signals.personal import find
from soma.serve.errors import ApiError
from soma.serve.guards.config import Check, Guarded, Moderation, Personal
from soma.serve.guards.grounded import groundedness
from soma.serve.guards.injection import injection_score
from soma.serve.v2.datatypes import Tensors, as_objects

Ask = Callable[[str, Tensors], Awaitable[Tensors]]
LONGEST_FORM = 80  # letters of what is masked in a stream; longer secrets are seen when their beginning has gone out


def stopped(name: str) -> ApiError:
    """The answer where a check refuses."""
    return ApiError(400, f"the check `{name}` of this service stopped the request", code="content_filter")


def masked(text: str, kinds: Sequence[str]) -> tuple[str, Counter[str]]:
    """The text with personal data of these kinds replaced, and how many of each there were."""
    found, made, last = Counter[str](), [], 0
    for one in find(text):
        if one.kind in kinds:
            made += [text[last : one.start], f"<{one.kind}>"]
            last = one.end
            found[one.kind] += 1
    return "".join([*made, text[last:]]), found


def maskers(checks: Sequence[Check]) -> list[str]:
    """Kinds that are to be masked."""
    options = [check.personal for check in checks if check.personal is not None and check.personal.action == "mask"]
    return [kind for each in options for kind in each.kinds]


async def problem(check: Check, text: str, passages: Sequence[str], ask: Ask) -> bool:
    """Whether a check objects to a text. Raises ApiError where a classifier cannot be asked."""
    if check.injection is not None:
        return injection_score(text) >= check.injection.threshold
    if check.personal is not None:
        return objects_to(check.personal, text)
    if check.grounded is not None:
        return groundedness(text, passages) < check.grounded.threshold
    assert check.moderation is not None
    return await moderated(check.moderation, text, ask)


def objects_to(options: Personal, text: str) -> bool:
    """Whether there is personal data that is not only masked."""
    return options.action == "block" and any(one.kind in options.kinds for one in find(text))


async def moderated(options: Moderation, text: str, ask: Ask) -> bool:
    """Whether a classifier gives one of the labels that are stopped. Raises ApiError."""
    answer = await ask(options.model, {options.input: as_objects([text.encode()], (1,))})
    if options.output not in answer:
        raise ApiError(500, f"the classifier {options.model} gave no {options.output}")
    found = answer[options.output]
    if found.dtype == object:
        return found.ravel()[0].decode(errors="replace") in options.labels
    labels = answer.get("labels")
    names = [each.decode(errors="replace") for each in labels.ravel()] if labels is not None else []
    scores = np.atleast_2d(found)[0]
    if len(names) != len(scores):
        raise ApiError(500, f"the classifier {options.model} names {len(names)} labels for {len(scores)} scores")
    return any(score >= options.threshold for name, score in zip(names, scores, strict=True) if name in options.labels)


async def judge(checks: Sequence[Check], text: str, passages: Sequence[str], ask: Ask) -> tuple[str, list[str]]:
    """A whole text: what of it may go on, and the checks that objected and only say so. Raises ApiError 400."""
    flagged = []
    for check in checks:
        if await problem(check, text, passages, ask):
            if check.action == "block":
                raise stopped(check.name)
            flagged.append(check.name)
    return masked(text, maskers(checks))[0] if maskers(checks) else text, flagged


async def judged(
    options: Guarded, pieces: AsyncIterator[str], passages: Sequence[str], ask: Ask
) -> AsyncGenerator[str, None]:  # fmt: skip
    """The pieces of a stream that may go on, later and larger than they came. Nothing goes out before it was looked at,
    together with `window` letters before it; what has a form is held until it is whole. `grounded` needs whole
    sentences and looks at the end. Raises ApiError 400 in the middle."""
    before, held = "", ""  # gone out (as it came), and not yet
    on_the_way = [check for check in options.checks if check.grounded is None]
    kinds, fresh, whole = maskers(options.checks), 0, []
    async for piece in pieces:
        held += piece
        fresh += len(piece)
        if fresh < options.step:
            continue
        fresh = 0
        for check in on_the_way:
            if await problem(check, before + held, passages, ask):
                raise stopped(check.name)
        text, held, before = release(before, held, kinds, options.window)
        whole.append(text)
        if text:
            yield text
    for check in on_the_way:
        if await problem(check, before + held, passages, ask):
            raise stopped(check.name)
    last = masked_after(before, held, kinds)
    for check in options.checks:
        if check.grounded is not None and await problem(check, "".join([*whole, last]), passages, ask):
            raise stopped(check.name)
    if last:
        yield last


def release(before: str, held: str, kinds: Sequence[str], window: int) -> tuple[str, str, str]:
    """What of `held` goes out, masked; what stays; and the letters before that."""
    cut = max(0, len(held) - LONGEST_FORM) if kinds else len(held)
    if not kinds:
        return held, "", (before + held)[-window:]
    for one in find(before + held):
        start, end = one.start - len(before), one.end - len(before)
        if start < cut < end:
            cut = max(0, start)
    return masked_after(before, held[:cut], kinds), held[cut:], (before + held[:cut])[-window:]


def masked_after(before: str, text: str, kinds: Sequence[str]) -> str:
    """`text` masked, seen together with what stands before it."""
    if not kinds:
        return text
    made, last = [], 0
    for one in find(before + text):
        start, end = one.start - len(before), one.end - len(before)
        if one.kind in kinds and start >= 0:
            made += [text[last:start], f"<{one.kind}>"]
            last = end
    return "".join([*made, text[last:]])
