"""A language model as a node, in engine processes that the graph owns:

    llm: {llm: {model: ./model, replicas: 2, chat: true}, parameters: {max_tokens: 64}}

`text_input` (BYTES, [N]) to `text_output`, streamed where that is asked for, with all that `soma.serve.v2.llm` takes
and gives. Redeployed (`soma graph deploy`), a new engine starts beside the old one, which ends with its last stream.
"""

import threading
from typing import TYPE_CHECKING, Any

from pydantic import Field

from soma.base.errors import UserError
from soma.serve.graphs.kinds import NodeKind, Place

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from soma.serve.v2.model import V2Model


class LLM(NodeKind):
    """What stands under `llm`. Options as of `soma serve`."""

    model: str = Field(min_length=1, description="folder, hf:ID or registry:NAME@VERSION")
    chat: bool = Field(False, description="text_input is what a user says, put into the model's chat template")
    system: str | None = Field(None, description="before it; with chat")
    replicas: int = Field(1, ge=1, le=64, description="engine processes with a copy of the model each")
    precision: str = "auto"
    device: str = "auto"
    max_length: int | None = Field(None, ge=1)
    max_running: int = Field(64, ge=1)
    max_waiting: int = Field(256, ge=0)
    weights: str | None = None
    cache_dtype: str = "auto"
    speculate: str | None = None
    adapters: dict[str, str] = Field({}, description="names and PEFT folders")
    in_process: bool = Field(False, description="no process of its own for the engine, to debug it")

    def build(self, place: Place) -> "V2Model":
        """Start the engine. Raises UserError: no such model, one that makes no text or has no chat template."""
        from soma.engine.launch import launch
        from soma.serve.server import start_engine
        from soma.serve.service import MAX_BODY_BYTES, Service

        if self.in_process and self.replicas > 1:
            raise UserError("in_process is one replica")
        beside = place.folder / self.model
        launched = [] if self.in_process else [launch(self.replicas) for _ in range(self.replicas)]
        options = self.model_dump(include={"precision", "device", "max_length", "max_running", "max_waiting", "weights",
                                           "cache_dtype", "speculate"})  # fmt: skip
        adapters = {name: str(place.folder / folder) for name, folder in self.adapters.items()}
        engine, tokenizer, _, embedder = start_engine(
            str(beside) if beside.is_dir() else self.model, launched, adapters=adapters, **options
        )
        try:
            service = Service(engine, tokenizer, f"{place.graph}.{place.node}", MAX_BODY_BYTES, embedder,
                              place.front.host.gates)  # fmt: skip
            if not service.makes_text:
                raise UserError(f"{self.model}: this model makes no text")
            if self.chat and not tokenizer.has_chat_template:
                raise UserError(f"{self.model}: no chat template; leave chat out")
            return node_model(service, self)
        except BaseException:
            engine.close()
            raise


def node_model(service: Any, options: LLM) -> "V2Model":
    """The model over an engine that it owns."""
    import numpy as np

    from soma.serve.errors import ApiError
    from soma.serve.v2.datatypes import Tensors
    from soma.serve.v2.llm import LanguageModel
    from soma.serve.v2.model import Job, Options

    class Owned(LanguageModel):
        """Gives the answer alone unless the prompt is asked for."""

        @property
        def registry(self) -> "CollectorRegistry":
            """Its metrics."""
            found: CollectorRegistry = service.metrics.registry
            return found

        async def job(self, tensors: Tensors, options: Options) -> Job:
            return await super().job({"exclude_input_in_output": np.ones(1, bool), **tensors}, options)

        def read_prompts(self, tensors: Tensors) -> list[list[int]]:
            if not chat or "text_input" not in tensors:
                return super().read_prompts(tensors)
            try:
                texts = [element.decode() for element in tensors["text_input"].ravel()]
            except UnicodeDecodeError:
                raise ApiError(400, "text_input is no UTF-8", "text_input") from None
            said = [[*before, {"role": "user", "content": text}] for text in texts]
            return [service.tokenizer.encode_chat(messages, True, None) for messages in said]

        def close(self) -> None:
            # Ending a process takes seconds, in which other nodes' streams go on.
            threading.Thread(target=service.engine.close, name="soma-node-end").start()

    chat = options.chat
    before = [] if options.system is None else [{"role": "system", "content": options.system}]
    return Owned(service)
