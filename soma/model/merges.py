"""More merges for a BPE tokenizer that is trained already, learned on another text. Loads no torch."""

import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable

from tokenizers import Tokenizer as Inner

from soma.base.errors import UserError
from soma.model.tokenizer import Tokenizer

Pair = tuple[str, str]
MIN_FREQUENCY = 2


def learn(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> list[Pair]:
    """The next `size` merges of BPE training (Sennrich et al. 2016) on `texts`, begun where the tokenizer stands.

    The text is cut as the tokenizer cuts it; each merge joins the most frequent pair of neighbours, ties by the text. A
    pair that is seen once is not merged, so there may be fewer. Raises UserError for a tokenizer that is not BPE.
    """
    inner = tokenizer.plain
    if json.loads(inner.model.__getstate__()).get("type") != "BPE":
        raise UserError("only a BPE tokenizer can learn further tokens from a text: name the tokens one by one instead")
    counts: Counter[str] = Counter()
    cut = inner.pre_tokenizer
    for text in texts:
        if inner.normalizer is not None:
            text = inner.normalizer.normalize_str(text)
        counts.update([text] if cut is None else [part for part, _ in cut.pre_tokenize_str(text)])
    words = [[token.value for token in inner.model.tokenize(part)] for part in counts]
    return _merge(words, list(counts.values()), size, set(inner.get_vocab()))


def _merge(words: list[list[str]], counts: list[int], size: int, known: set[str]) -> list[Pair]:
    """BPE's loop: `words` are changed in place. A merge whose result is a token already is a merge, but no new token,
    and is not counted in `size`.
    """
    frequency: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, word in enumerate(words):
        for pair in itertools.pairwise(word):
            frequency[pair] += counts[number]
            places[pair].add(number)
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    made = 0
    while heap and made < size:
        count, pair = heapq.heappop(heap)
        if -count != frequency[pair]:  # it changed since it was put there; its newer entry is in the heap
            continue
        if -count < MIN_FREQUENCY:
            break
        merges.append(pair)
        made += pair[0] + pair[1] not in known
        changed: set[Pair] = set()
        for number in sorted(places.pop(pair)):
            before = words[number]
            after = _joined(before, pair)
            for old in itertools.pairwise(before):
                frequency[old] -= counts[number]
                changed.add(old)
            for new in itertools.pairwise(after):
                frequency[new] += counts[number]
                places[new].add(number)
                changed.add(new)
            words[number] = after
        for one in changed - {pair}:
            if frequency[one] > 0:
                heapq.heappush(heap, (-frequency[one], one))
    return merges


def _joined(word: list[str], pair: Pair) -> list[str]:
    out: list[str] = []
    place = 0
    while place < len(word):
        if place + 1 < len(word) and (word[place], word[place + 1]) == pair:
            out.append(word[place] + word[place + 1])
            place += 2
        else:
            out.append(word[place])
            place += 1
    return out


def with_merges(tokenizer: Tokenizer, merges: Iterable[Pair]) -> tuple[Inner, dict[int, list[int]]]:
    """The tokenizer with further merges, of the lowest priority, and for each new id the old ids that it is made of."""
    facts = json.loads(tokenizer.inner.to_str())
    vocabulary: dict[str, int] = facts["model"]["vocab"]
    old = facts["model"]["merges"]
    as_text = bool(old) and isinstance(old[0], str)
    made_of = {token: [id] for token, id in vocabulary.items()}
    next_id = tokenizer.vocab_size
    pieces: dict[int, list[int]] = {}
    for left, right in merges:
        old.append(f"{left} {right}" if as_text else [left, right])
        token = left + right
        if token not in vocabulary:
            vocabulary[token] = next_id
            made_of[token] = pieces[next_id] = made_of[left] + made_of[right]
            next_id += 1
    return Inner.from_str(json.dumps(facts)), pieces
