"""Two texts as one list of ids, as a cross-encoder reads them."""

from collections.abc import Sequence

from tokenizers import Tokenizer


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], most: int
) -> tuple[list[list[int]], list[int]]:  # fmt: skip
    """Ids of each pair with the special tokens around and between, and how many of them are the first text's.

    A pair longer than `most` tokens loses the end of its longer text, then of both: transformers' `longest_first`.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    made = dict(zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True))
    room = most - tokenizer.num_special_tokens_to_add(True)
    prompts, firsts = [], []
    for one, two in pairs:
        first, second = made[one], made[two]
        kept = cut(len(first.ids), len(second.ids), room)
        if kept != (len(first.ids), len(second.ids)):
            first, second = tokenizer.encode_batch([one, two], add_special_tokens=False)  # truncation is in place
            first.truncate(kept[0])
            second.truncate(kept[1])
        whole = tokenizer.post_process(first, second)
        prompts.append(whole.ids)
        firsts.append(whole.type_ids.index(1) if 1 in whole.type_ids else len(whole.ids))
    return prompts, firsts


def cut(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that share `room`: `cut(10, 90, 50)` is (10, 40), `cut(40, 90, 50)` is (25, 25)."""
    if first + second <= room:
        return first, second
    if min(first, second) <= room // 2:
        return (first, room - first) if first <= second else (room - second, second)
    half = room // 2
    return (half, room - half) if first <= second else (room - half, half)
