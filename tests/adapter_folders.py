"""Random adapters for a model folder, and what each says alone, for tests of more than one room."""

from pathlib import Path

import torch

from soma.model.hub import load_model
from soma.model.lora import add_lora, load_lora, lora_layers, merge_lora, remove_lora, save_lora
from soma.model.lora_config import LoRAConfig


def make_adapter(base: Path, folder: Path, config: LoRAConfig, seed: int) -> Path:
    """Write an adapter that is wide enough to change the base's tokens."""
    model = load_model(base)
    add_lora(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for half in (layer.lora_A, layer.lora_B):
                half.copy_(torch.randn(half.shape, generator=generator) * 0.2)
    save_lora(model, config, folder)
    return folder


def greedy_alone(base: Path, adapter: Path | None, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the base with the adapter merged into it, the whole text computed anew for every token."""
    model = load_model(base)
    if adapter is not None:
        load_lora(model, adapter)
        merge_lora(model)
        remove_lora(model)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]
