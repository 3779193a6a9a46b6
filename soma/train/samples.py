"""Short continuations during training, for the person who watches."""

import torch

from soma.model.cache import KVCache
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer


@torch.no_grad()
def continue_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    chat: bool = False,
    device: torch.device | None = None,
) -> str:
    """At most `tokens` tokens after `prompt` (with `chat`: after a user's message of it), in fp32, no special tokens.

    Draws from a generator of its own, so that sampling leaves the run's random state alone. Temperature 0 takes the
    likeliest token. Stops at an end token. `device` is where the model computes; None: where its weights are.
    """
    device = device or model.device
    ids = tokenizer.encode_chat([{"role": "user", "content": prompt}], True) if chat else tokenizer.encode(prompt)
    if not ids:
        ids = [tokenizer.eos_ids[0]]
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model.config, 1, len(ids) + tokens, device=device)
    fresh, given = torch.tensor([ids], device=device), len(ids)
    while len(ids) < given + tokens:
        x_BTD, _ = model.features(fresh, cache=cache)
        logits_V = model.logits(x_BTD[0, -1]).float().cpu()
        if temperature == 0:
            chosen = int(logits_V.argmax())
        else:
            chosen = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
        if chosen in tokenizer.eos_ids:
            break
        ids.append(chosen)
        fresh = torch.tensor([[chosen]], device=device)
    return tokenizer.decode(ids[given:])
