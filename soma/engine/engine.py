"""The engine: many requests over one model, on a thread of its own. No HTTP here.

This is the side that clients see: what an engine is made of, and taking requests. What its thread does is in `steps`.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from soma.base.errors import UserError
from soma.engine.adapters import Adapters
from soma.engine.blocks import BlockPool
from soma.engine.check import check_request
from soma.engine.draft import DraftModel, load_draft
from soma.engine.errors import EngineClosedError, QueueFullError
from soma.engine.guided import Guides
from soma.engine.handover import threadsafe
from soma.engine.memory import GPU_SHARE, fitting_tokens
from soma.engine.paged import PagedCache, cache_dtype_of
from soma.engine.pages import gather
from soma.engine.params import SamplingParams
from soma.engine.prompts import Prompt, answer_all, ids_of
from soma.engine.request import Completion, Request, TokenEvent, Tokenizer
from soma.engine.runner import Runner
from soma.engine.scheduler import Scheduler
from soma.engine.speculate import DRAFT_TOKENS, NgramProposer, Speculator
from soma.engine.steps import StepLoop
from soma.model.folder import local_folder
from soma.model.quantized import quantize
from soma.model.transformer import Transformer

if TYPE_CHECKING:
    from soma.engine.parallel.group import RankGroup

log = logging.getLogger("soma.engine")

BITS = {"int8": 8, "int4": 4}


class Engine(StepLoop):
    """Runs requests on a model until `close()`.

    Args:
        model: a folder or reference, or what `soma.model.hub.load_model` gives. The engine fuses its layers, which
            ends its training.
        tokenizer: for end-of-text ids and text; that of the folder where `model` is one.
        max_length: most tokens of a prompt and its answer together; None: the model's context, or what memory holds.
        max_running: requests that run at once.
        max_waiting: requests that wait at most; more raise `QueueFullError`.
        step_tokens: tokens that one step computes at most, over all requests; None: 512 on a CPU, 8192 on a GPU.
        prefill_chunk: prompt tokens of one request in a step; None: 512 on a CPU, 2048 on a GPU.
        cache_tokens: tokens of the cache; None: what fits beside the largest step (see `soma.engine.memory`), but no
            more than `max_running` requests of `max_length` can use.
        cache_dtype: "fp8" halves the cache's bytes per token against 16 bits (e4m3, no scales; Triton and reference
            backends), "int8" nearly (a scale for each token and head; native and reference); "auto": the model's dtype.
        gpu_memory_utilization: share of a GPU's memory for weights, steps and cache together.
        cuda_graphs: replay decode steps as CUDA graphs, captured at the start (Triton backend).
        block_size: tokens of a block of the cache, a power of two.
        prefix_cache: keep what was computed, and reuse it for requests that begin with the same tokens.
        weights: "int8" or "int4" rounds the linear layers at load (groups of 32); None leaves them.
        backend: what computes the steps, "auto" for the fastest that can (see `soma.engine.backends`).
        overlap: plan and deliver while a step computes (see `soma.engine.overlap`); None: on one GPU.
        share: engines that have the free memory between them.
        group: the ranks that hold the model, `model` being rank 0's part of it; they have rounded weights already.
        speculate: "ngram", or the folder or reference of a draft model with the same tokenizer: guess tokens and check
            them in one step, where that is faster (see `soma.engine.speculate`).
        draft_tokens: tokens of a draft at most.
    """

    def __init__(
        self, model: Transformer | str | Path, tokenizer: Tokenizer | None = None, *,
        max_length: int | None = None, max_running: int = 64,
        max_waiting: int = 256, step_tokens: int | None = None, prefill_chunk: int | None = None,
        cache_tokens: int | None = None, cache_dtype: str = "auto", block_size: int = 16, prefix_cache: bool = True,
        weights: str | None = None,
        backend: str = "auto", gpu_memory_utilization: float = GPU_SHARE, cuda_graphs: bool = True,
        overlap: bool | None = None, share: int = 1, group: "RankGroup | None" = None,
        speculate: str | Path | None = None, draft_tokens: int = DRAFT_TOKENS,
    ) -> None:  # fmt: skip
        if isinstance(model, str | Path):
            from soma.engine.load import load_weights

            model, tokenizer = load_weights(local_folder(model))
        assert tokenizer is not None
        draft = None if speculate in (None, "ngram") else load_draft(str(speculate), model, tokenizer)
        bits = weight_bits(weights)
        for each in (model, draft):
            if each is not None:
                gather(each if bits is None else quantize(each, bits))
        self.config, self.tokenizer = model.config if group is None else group.config, tokenizer
        self.device = model.device
        stored = cache_dtype_of(cache_dtype, model.dtype)
        if group is not None and stored != model.dtype:
            raise UserError(f"cache_dtype {cache_dtype!r} with a model over several processes: leave it at auto")
        self.guides = Guides(tokenizer, self.config.vocab_size)
        context = self.config.max_position_embeddings
        usual_step, usual_chunk = (8192, 2048) if self.device.type == "cuda" else (512, 512)
        step_tokens = max(step_tokens or usual_step, max_running + 1)
        if cache_tokens is None:
            fit = (
                partial(fitting_tokens, model, backend=backend, cache_dtype=stored)
                if group is None
                else group.fitting_tokens
            )
            fitting = fit(
                block_size=block_size, step_tokens=step_tokens, max_running=max_running,
                gpu_memory_utilization=gpu_memory_utilization, share=share,
            )  # fmt: skip
            if draft is not None:  # it has a cache of as many tokens
                mine = PagedCache.block_bytes(model.config, 1, stored)
                other = PagedCache.block_bytes(draft.config, 1, draft.dtype)
                fitting = int(fitting * mine / (mine + other))
            cache_tokens = max(block_size, min(fitting, max_running * (min(max_length or context, context) + 1)))
        blocks = max(1, cache_tokens // block_size)
        self.max_length = min(max_length or context, context, blocks * block_size)
        if group is not None:
            group.start(blocks, block_size)
            self.cache, self.runner = group.cache, group
        else:
            self.cache = PagedCache(self.config, blocks, block_size, stored, self.device)
            graphs = (max_running, self.max_length) if cuda_graphs else None
            self.runner = Runner(model, self.cache, backend=backend, graphs=graphs)
        if self.runner.reason is not None:
            log.info("steps run in plain PyTorch: %s", self.runner.reason)
        self.adapters = Adapters(model, self.runner.backend)
        self.pool = BlockPool(blocks, block_size, prefix_cache=prefix_cache)
        windows = [self.config.window(layer) for layer in range(self.config.num_hidden_layers)]
        widest = None if None in windows else max(window for window in windows if window is not None)
        self.scheduler = Scheduler(
            self.pool, max_running=max_running, step_tokens=step_tokens,
            prefill_chunk=prefill_chunk or usual_chunk, window=widest,
        )  # fmt: skip
        self.speculator = None
        if speculate is not None:
            if draft_tokens < 1:
                raise UserError(f"draft_tokens {draft_tokens}: expected 1 or more")
            proposer = NgramProposer() if draft is None else DraftModel(
                draft, self.config.vocab_size, blocks, block_size, step_tokens, backend=backend
            )  # fmt: skip
            self.speculator = Speculator(proposer, draft_tokens)
        self.max_running, self.max_waiting = max_running, max_waiting
        self.inbox = []
        # A draft needs the token before it: with speculation each step is read before the next one is planned.
        overlaps = self.device.type == "cuda" and group is None if overlap is None else overlap
        self.overlap = overlaps and speculate is None
        self.flight = None
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="soma-engine", daemon=True)
        self.thread.start()

    # For those who ask:

    def stats(self) -> dict[str, float]:
        """Figures for metrics: see `soma.engine.stats`."""
        return {
            "running": len(self.scheduler.running), "waiting": len(self.inbox) + len(self.scheduler.waiting),
            "kv_cache_usage": self.pool.used / self.pool.num_blocks,
            "prefix_cache_queries": self.scheduler.prefix_queries, "prefix_cache_hits": self.scheduler.prefix_hits,
            "preemptions": self.scheduler.preemptions,
            "draft_tokens": self.speculator.num_draft_tokens if self.speculator else 0,
            "accepted_tokens": self.speculator.num_accepted_tokens if self.speculator else 0,
        }  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step of one token reads: all but an embedding that is not the output's too."""
        model = self.runner.model
        tensors = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "rope" not in name)]
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        if model.lm_head is not None:
            unique.pop(model.embed_tokens.weight.data_ptr(), None)
        return sum(unique.values())

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Refuse what can never run, with the field's name; gives the most tokens that the request may make.

        Raises RequestError: see `soma.engine.check.check_request`.
        """
        self.guides.check(params.guided)
        return check_request(prompt_ids, params, self.config.vocab_size, self.max_length)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load a PEFT folder that requests may choose by `name`.

        Raises UserError: see `Adapters.load`; the model is spread over several processes.
        """
        if self.runner.name == "parallel":
            raise UserError(f"the adapter {name!r}: a model over several processes takes none; serve it in one")
        self.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter, wait for those that are in, and free it. Raises RequestError."""
        self.adapters.unload(name)

    @property
    def adapter_folders(self) -> dict[str, str]:
        """The adapters that requests may choose, and where each was loaded from."""
        return self.adapters.folders

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None,
        deliver: Callable[[TokenEvent], None] | None = None, *, adapter: str | None = None,
    ) -> Request:  # fmt: skip
        """Queue a request, for the base model or one of its adapters.

        Raises RequestError (see `check`; an adapter that is not there), QueueFullError, EngineClosedError.
        """
        return self.submit_all([prompt_ids], params, [deliver] if deliver else None, adapter=adapter)[0]

    def submit_all(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None,
        deliver: Sequence[Callable[[TokenEvent], None]] | None = None, *, priority: int = 0, key: str = "",
        timeout: float | None = None, adapter: str | None = None,
    ) -> list[Request]:  # fmt: skip
        """Queue several requests, all of them or none.

        priority: lower runs first. key: whose they are; keys share the engine evenly. timeout: seconds after which
        they end with an error. adapter: the name of a loaded one; None is the base model.
        """
        each = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        deadline = None if timeout is None else time.monotonic() + timeout
        chosen = self.adapters.acquire(adapter, len(prompts))
        try:
            requests = [
                Request(
                    list(ids), one, self.tokenizer, self.check(ids, one), deliver[i] if deliver else None,
                    priority=priority, key=key, deadline=deadline, adapter=chosen,
                    guide=self.guides.start(one.guided),
                )
                for i, (ids, one) in enumerate(zip(prompts, each, strict=True))
            ]  # fmt: skip
            self._enqueue(requests)
        except BaseException:
            self.adapters.release(chosen, len(prompts))
            raise
        return requests

    def _enqueue(self, requests: list[Request]) -> None:
        with self.changed:
            if self.closing:
                raise EngineClosedError("the engine is shutting down")
            waiting = len(self.inbox) + len(self.scheduler.waiting)
            free = max(self.max_running - len(self.scheduler.running), 0)
            if waiting + len(requests) > self.max_waiting + free:
                raise QueueFullError(waiting, retry_after=1 + waiting // self.max_running)
            self.inbox.extend(requests)
            self.changed.notify()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> AsyncIterator[TokenEvent]:
        """Submit text or ids and yield events on the running event loop; leaving it early cancels the request."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        deliver = threadsafe(loop, events.put_nowait)
        request = self.submit(ids_of(self, prompt), params, deliver, adapter=adapter)
        try:
            while True:
                event = await events.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            request.cancel()

    @overload
    def generate(
        self, prompts: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Completion: ...

    @overload
    def generate(
        self, prompts: list[str] | list[list[int]] | list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None, *, adapter: str | None = None,
    ) -> list[Completion]: ...  # fmt: skip

    def generate(self, prompts: Any, params: Any = None, *, adapter: str | None = None) -> Any:
        """The answer to a prompt (text or ids), or the answers to a list of them: see `answer_all`."""
        if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
            return self.submit(ids_of(self, prompts), params, adapter=adapter).result()
        return answer_all(self, prompts, params, adapter)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self.thread.is_alive() and not self.closing

    @property
    def idle(self) -> bool:
        with self.changed:
            return not self.waiting and not self.scheduler.running

    def close(self, *, drain: bool = False, timeout: float = 30.0) -> None:
        """Take no more requests; with `drain` finish those that are in, else cancel them. Ends the thread."""
        with self.changed:
            self.closing = True
            if not drain:
                self._cancel_all()
            self.changed.notify()
        self.thread.join(timeout)
        if self.thread.is_alive():
            self._cancel_all()
            self.thread.join(timeout)

    def _cancel_all(self) -> None:
        for request in [*self.waiting, *self.running]:
            request.cancel()


def weight_bits(weights: str | None) -> int | None:
    """What `weights` asks for. Raises UserError."""
    if weights is not None and weights not in BITS:
        raise UserError(f"weights {weights!r}: expected one of {', '.join(BITS)}")
    return None if weights is None else BITS[weights]
