"""Routers that choose again what they chose in one process, so that bf16 is held as tightly with experts as without.

Two of a token's experts are at times nearer to each other than bf16 resolves. Under another layout a rounding then
sends the token elsewhere, which is right and yet moves a gradient by tenths. So one process notes every choice under
the token's place in the whole batch, and the ranks are made to choose the same. All else is computed: scores, the
weights of the chosen, the balancing loss, what travels to which rank. In fp32 routers choose for themselves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from soma.model.moe import MoE
from soma.model.transformer import Transformer

Choices = dict[tuple[int, str], Tensor]  # by step and layer: the K experts of every token of the batch, (B, T, K)


class Replay:
    """Notes or repeats the choices of a model's routers.

    tokens: by step all tokens of the batch, (B, T). columns: those of T that this rank has. Rows are known by their
    tokens, wherever a microbatch's pieces have gone. step: the number of the step that is under way. known: what one
    process has noted; None: note it, in `choices`.
    """

    def __init__(
        self, tokens: Callable[[int], np.ndarray], columns: np.ndarray, step: Callable[[], int],
        known: Choices | None,
    ) -> None:  # fmt: skip
        self.tokens, self.columns, self.step, self.known = tokens, columns, step, known
        self.choices: Choices = {}
        self.by_memory: dict[int, np.ndarray] = {}

    def attach(self, model: Transformer) -> None:
        """To what a rank has of the model, after a layout has been applied to it."""
        plain = model.context

        def context(x_BTD: Tensor, tokens_BT: Tensor, *rest: Any) -> Any:
            rope, masks, keep_BT = plain(x_BTD, tokens_BT, *rest)
            keep_BT.rows = self.rows(tokens_BT)  # the one argument of an MoE that tells microbatches apart
            self.by_memory[keep_BT.data_ptr()] = keep_BT.rows
            return rope, masks, keep_BT

        model.context = context  # type: ignore[method-assign]
        for name, layer in model.layers.named_children():
            if isinstance(layer.mlp, MoE):
                gate = layer.mlp.gate
                layer.mlp.route = partial(self.route, gate, layer.mlp.route)  # type: ignore[method-assign]
                gate.choose = partial(self.choose, name, gate, gate.choose)  # type: ignore[method-assign]

    def rows(self, tokens_BT: Tensor) -> np.ndarray:
        """The rows of the batch that a microbatch's tokens are a part of."""
        batch = self.tokens(self.step())[:, self.columns]
        found = [np.flatnonzero((batch == row).all(axis=1)) for row in tokens_BT.cpu().numpy()]
        assert all(len(rows) == 1 for rows in found), "two rows have the same tokens"
        return np.concatenate(found)

    def route(self, gate: nn.Module, plain: Callable[..., Any], x_ND: Tensor, keep_BT: Any) -> Any:
        """In place of `MoE.route`, also when it is computed again: whose tokens they are."""
        # DeepSpeed's hooks make another tensor of it, in the same memory.
        gate.rows = keep_BT.rows if hasattr(keep_BT, "rows") else self.by_memory[keep_BT.data_ptr()]  # type: ignore[assignment]
        return plain(x_ND, keep_BT)

    def choose(self, name: str, gate: Any, plain: Callable[[Tensor], Tensor], scores_NE: Tensor) -> Tensor:
        """In place of `Router.choose`."""
        key, place = (self.step(), name), np.ix_(gate.rows, self.columns)
        if self.known is not None:
            return self.known[key][place].flatten(0, 1).to(scores_NE.device)
        chosen_NK = plain(scores_NE)
        if key not in self.choices:
            batch = self.tokens(self.step())
            self.choices[key] = torch.full((*batch.shape, chosen_NK.size(1)), -1)
        self.choices[key][place] = chosen_NK.cpu().view(len(gate.rows), len(self.columns), -1)
        return chosen_NK
