"""Short continuations during training, for the person who watches.

Where every rank has the whole model, or gathers it, a prompt goes through it with a cache. Where a layout has taken the
model or the sequence apart (tp, cp, pp), all prompts go through together, of one padded length, once for each token and
without a cache: such passes are those of training, so nothing has to be built for them, and some tokens are few.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from soma.model.cache import KVCache
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer
from soma.train.parallel.apply import Parallel

Choose = Callable[[Tensor], list[int]]


@torch.no_grad()
def continue_texts(
    parallel: Parallel, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, temperature: float, seed: int,
    device: torch.device, chat: bool = False,
) -> list[str]:  # fmt: skip
    """At most `tokens` tokens after each prompt (with `chat`: after a user's message of it), in the parameters' dtype,
    no special tokens. All ranks take part, and all get the texts.

    Draws from generators of its own, so that sampling leaves the run's random state alone. Temperature 0 takes the
    likeliest token. Stops at an end token, or where the model's positions end. `device` is where the model computes,
    wherever its weights lie.
    """
    given = [prompt_ids(tokenizer, prompt, chat) for prompt in prompts]
    layout = parallel.mesh.layout
    if layout.tp * layout.cp * layout.pp > 1:
        choose = chooser(temperature, seed, len(given), parallel.mesh.size, device)
        found = continue_padded(parallel, given, tokens, choose, tokenizer.eos_ids, device)
    else:
        found = [
            continue_cached(parallel.model, ids, tokens, chooser(temperature, seed, 1, parallel.mesh.size, device),
                            tokenizer.eos_ids, device)
            for ids in given
        ]  # fmt: skip
    return [tokenizer.decode(ids) for ids in found]


def prompt_ids(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    """The tokens to go on from; an end token where there are none."""
    ids = tokenizer.encode_chat([{"role": "user", "content": prompt}], True) if chat else tokenizer.encode(prompt)
    return ids or [tokenizer.eos_ids[0]]


def chooser(temperature: float, seed: int, rows: int, ranks: int, device: torch.device) -> Choose:
    """From scores (rows, V) to the next tokens. Rank 0 chooses for all: a tie may fall otherwise elsewhere."""
    generators = [torch.Generator().manual_seed(seed) for _ in range(rows)]

    def choose(scores_PV: Tensor) -> list[int]:
        chosen_P = scores_PV.argmax(-1)
        if temperature > 0:
            shares_PV = (scores_PV.float().cpu() / temperature).softmax(-1)
            pairs = zip(shares_PV, generators, strict=True)
            drawn = [int(torch.multinomial(shares_V, 1, generator=own)) for shares_V, own in pairs]
            chosen_P = torch.tensor(drawn, device=device)
        if ranks > 1:
            dist.broadcast(chosen_P, 0)
        return [int(token) for token in chosen_P.tolist()]

    return choose


def continue_cached(
    model: Transformer, given: list[int], tokens: int, choose: Choose, ends: Sequence[int], device: torch.device
) -> list[int]:  # fmt: skip
    """What comes after one prompt."""
    room = min(tokens, model.config.max_position_embeddings - len(given))
    if room <= 0:
        return []
    cache = KVCache(model.config, 1, len(given) + room, dtype=model.dtype, device=device)
    found: list[int] = []
    fresh = given
    while len(found) < room:
        x_BTD, _ = model.features(torch.tensor([fresh], device=device), cache=cache)
        (chosen,) = choose(model.logits(x_BTD[:, -1]))
        if chosen in ends:
            break
        found.append(chosen)
        fresh = [chosen]
    return found


def continue_padded(
    parallel: Parallel, given: list[list[int]], tokens: int, choose: Choose, ends: Sequence[int], device: torch.device
) -> list[list[int]]:  # fmt: skip
    """What comes after all prompts, row by row of one tensor. Padding follows the text, where causal attention does not
    look; its positions are those that the text will have, as far as the model has any."""
    limit = parallel.model.config.max_position_embeddings
    rooms = [min(tokens, limit - len(ids)) for ids in given]
    longest = max(len(ids) + room for ids, room in zip(given, rooms, strict=True) if room > 0) if max(rooms) > 0 else 0
    length = parallel.mesh.layout.padded_length(longest)
    tokens_PT = torch.zeros(len(given), length, dtype=torch.long, device=device)
    for row, ids in enumerate(given):
        tokens_PT[row, : len(ids)] = torch.tensor(ids[:length], device=device)
    positions_PT = torch.arange(length, device=device).clamp(max=limit - 1).expand_as(tokens_PT)
    found: list[list[int]] = [[] for _ in given]
    goes_on = [room > 0 for room in rooms]
    while any(goes_on):
        places = [min(len(ids) + len(own), length) - 1 for ids, own in zip(given, found, strict=True)]
        chosen = choose(parallel.scores_at(tokens_PT, positions_PT, places))
        for row in [row for row, is_on in enumerate(goes_on) if is_on]:
            if chosen[row] in ends:
                goes_on[row] = False
                continue
            found[row].append(chosen[row])
            goes_on[row] = len(found[row]) < rooms[row]
            if goes_on[row]:
                tokens_PT[row, places[row] + 1] = chosen[row]
    return found
