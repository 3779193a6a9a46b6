"""A language model as judge of texts for `data.filters.quality`: its perplexity, as in CCNet (arXiv:1911.00359)."""

from collections.abc import Sequence
from typing import Any

from soma.base.artefact import content_hash
from soma.base.errors import UserError
from soma.base.fetch import fetch

PREFIX = "model:"
WINDOW = 512  # tokens of context at most: a quarter of the cost of 2,048, and pages differ by far more than that


class PerplexityScorer:
    """Perplexity per token of each text, by the convention of `soma.evaluate.perplexity`; low is familiar.

    address: a folder or another address of a model. `name` holds the hash of its files. It can be pickled: each process
    loads the model when it scores for the first time. Raises UserError for what is no model.
    """

    def __init__(self, address: str, window: int = WINDOW) -> None:
        self.folder, self.window = fetch(address), window
        if not (self.folder / "config.json").is_file() or not list(self.folder.glob("*.safetensors")):
            raise UserError(f"filters.quality.scorer: {address} is no model folder (config.json and safetensors)")
        self.name = f"perplexity:{content_hash(self.folder)}:{window}"
        self.loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loaded": None}

    def score(self, texts: Sequence[str]) -> list[float]:
        """A figure above 1 for each text; NaN for an empty one, which no rule drops."""
        import numpy as np

        from soma.evaluate.perplexity import separator_id, to_perplexity, token_logprobs
        from soma.model.hub import load_model
        from soma.model.tokenizer import Tokenizer

        if self.loaded is None:
            self.loaded = load_model(self.folder), Tokenizer.load(self.folder)
        model, tokenizer = self.loaded
        first = [separator_id(tokenizer)]
        ids = [np.array(first + one, np.uint32) for one in tokenizer.encode_batch(list(texts), as_text=True)]
        window = min(self.window, model.config.max_position_embeddings)
        costs = token_logprobs(model, ids, length=window, stride=window, batch_size=8)
        return [to_perplexity(-float(cost.sum(dtype=np.float64)), len(cost)) for cost in costs]


def open_model_scorer(address: str | None) -> PerplexityScorer | None:
    """The scorer of `model:ADDRESS`; None for other kinds, which the data room opens itself."""
    if address is None or not address.startswith(PREFIX):
        return None
    return PerplexityScorer(address.removeprefix(PREFIX))
