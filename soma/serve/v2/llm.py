"""A language model: text or ids in, text out, with the tensors of Triton's vLLM backend.

`sampling_parameters` is a JSON object with the fields of /v1/completions (vLLM's SamplingParams; numbers may be texts,
as in Triton's examples, and `lora_name` chooses an adapter). Without it the request's parameters are taken. As there,
`text_output` begins with the prompt unless the answer is streamed or `exclude_input_in_output` is true. `input_ids` in
place of the text, and `output_ids`, are ours. Source: triton-inference-server/vllm_backend, src/model.py and
docs/additional_outputs.md.
"""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from soma.engine.params import SamplingParams
from soma.engine.prompts import encode_prompt
from soma.engine.request import TokenEvent
from soma.serve.calls import Usage
from soma.serve.errors import ApiError
from soma.serve.generation import Generation, check
from soma.serve.protocol import CompletionRequest, parse
from soma.serve.v2.datatypes import Tensors
from soma.serve.v2.model import Job, Options, TensorSpec, V2Model, as_datatype

if TYPE_CHECKING:
    from soma.serve.service import Service

FLAGS = ("exclude_input_in_output", "return_finish_reason", "return_cumulative_logprob", "return_logprobs",
         "return_num_input_tokens", "return_num_output_tokens", "return_output_ids",
         "return_num_cached_tokens")  # fmt: skip
FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "timeout")
WHOLE = ("max_tokens", "n", "best_of", "seed", "top_k", "logprobs", "priority")
NOT_SAMPLING = ("timeout", "priority", "binary_data_output", "triton_enable_empty_final_response", "headers")


class LanguageModel(V2Model):
    """The engine's model, or an adapter of it."""

    platform = "soma_engine"
    decoupled = True
    inputs = (
        TensorSpec("text_input", "BYTES", (-1,), optional=True),
        TensorSpec("input_ids", "INT64", (-1,), optional=True),
        TensorSpec("stream", "BOOL", (1,), optional=True),
        TensorSpec("sampling_parameters", "BYTES", (1,), optional=True),
        *(TensorSpec(name, "BOOL", (1,), optional=True) for name in FLAGS),
    )
    outputs = (
        TensorSpec("text_output", "BYTES", (-1,)),
        TensorSpec("finish_reason", "BYTES", (-1,), optional=True),
        TensorSpec("cumulative_logprob", "FP32", (-1,), optional=True),
        TensorSpec("logprobs", "BYTES", (-1,), optional=True),
        TensorSpec("num_input_tokens", "UINT32", (1,), optional=True),
        TensorSpec("num_cached_tokens", "UINT32", (1,), optional=True),  # of them; vLLM's backend has no such output
        TensorSpec("num_output_tokens", "UINT32", (-1,), optional=True),
        TensorSpec("output_ids", "INT64", (-1,), optional=True),
    )

    def __init__(self, service: "Service", adapter: str | None = None) -> None:
        """adapter: the one to answer with, unless a request names another."""
        self.service, self.adapter = service, adapter

    @property
    def ready(self) -> bool:
        return bool(self.service.engine.alive)

    @property
    def retry_after(self) -> int:
        return int(getattr(self.service.engine, "retry_after", 30))

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """The whole answer."""
        job = await self.job(tensors, Options(parameters))
        job.begin()
        try:
            return await anext(job.answers())
        finally:
            job.end("ok")

    async def job(self, tensors: Tensors, options: Options) -> Job:
        """Raises ApiError that names the field for what cannot be done."""
        streamed = flag(tensors, "stream")
        if streamed and not options.stream:
            raise ApiError(400, "stream is true; this way gives one answer: use generate_stream or ModelStreamInfer")
        body, adapter = self.read_sampling(tensors, options.parameters)
        prompts = await asyncio.to_thread(self.read_prompts, tensors)
        wanted = {name for name in (spec.name for spec in self.outputs) if flag(tensors, f"return_{name}")}
        wanted |= {"text_output", *options.outputs}
        if wanted & {"cumulative_logprob", "logprobs"} and body.logprobs is None:
            body.logprobs = 0
        params = body.params()
        if params.guided is not None:
            await asyncio.to_thread(self.service.engine.guides.check, params.guided)
        count = len(prompts) * (body.n or 1)
        if count > 1 and (streamed or "output_ids" in wanted):
            raise ApiError(400, f"{count} answers: a stream, and output_ids, take one prompt and n of 1")
        scheduling = dict(body.scheduling)
        limits = [limit for limit in (scheduling["timeout"], options.timeout) if limit is not None]
        scheduling |= {"timeout": min(limits, default=None), "adapter": adapter or self.adapter}
        echoes = not flag(tensors, "exclude_input_in_output", default=streamed)
        if echoes and streamed:
            raise ApiError(400, "When streaming, `exclude_input_in_output` = False is not allowed.")
        given = self.read_texts(tensors, prompts) if echoes else []
        return Answers(self.service, prompts, params, body.n or 1, scheduling, wanted, given, streamed)

    def read_sampling(self, tensors: Tensors, parameters: Mapping[str, Any]) -> tuple[CompletionRequest, str | None]:
        """The sampling parameters as a completion request, and the adapter that they name."""
        if "sampling_parameters" in tensors:
            try:
                given = json.loads(tensors["sampling_parameters"][0])
            except (ValueError, RecursionError):
                raise ApiError(400, "sampling_parameters must be JSON", "sampling_parameters") from None
            if not isinstance(given, dict):
                raise ApiError(400, "sampling_parameters must be a JSON object", "sampling_parameters")
        else:
            given = {name: value for name, value in parameters.items() if name not in NOT_SAMPLING}
        adapter = given.pop("lora_name", None)
        if adapter is not None and self.service.check_model(str(adapter)) is None:
            adapter = None
        if forbidden := given.keys() & {"stream", "stream_options", "echo", "prompt", "model"}:
            raise ApiError(400, f"{', '.join(sorted(forbidden))}: no sampling parameter")
        values = {name: number(name, value) for name, value in given.items()}
        return parse({"model": self.service.model_name, "prompt": "", **values}, CompletionRequest), adapter

    def read_prompts(self, tensors: Tensors) -> list[list[int]]:
        """Ids of every prompt."""
        if ("text_input" in tensors) == ("input_ids" in tensors):
            raise ApiError(400, "give either text_input or input_ids", "text_input")
        if "input_ids" in tensors:
            return [tensors["input_ids"].tolist()]
        if not len(tensors["text_input"]):
            raise ApiError(400, "text_input is empty", "text_input")
        try:
            texts = [element.decode() for element in tensors["text_input"]]
        except UnicodeDecodeError:
            raise ApiError(400, "text_input is no UTF-8", "text_input") from None
        return [encode_prompt(self.service.tokenizer, text) for text in texts]

    def read_texts(self, tensors: Tensors, prompts: list[list[int]]) -> list[str]:
        """The prompts as texts."""
        if "text_input" in tensors:
            return [element.decode() for element in tensors["text_input"]]
        return [self.service.tokenizer.decode(ids) for ids in prompts]


DATATYPES = {spec.name: spec.datatype for spec in LanguageModel.outputs}


def flag(tensors: Tensors, name: str, *, default: bool = False) -> bool:
    """An optional input of one BOOL."""
    return bool(tensors[name][0]) if name in tensors else default


def number(name: str, value: Any) -> Any:
    """Numbers that came as text, as in Triton's examples, become numbers; what is none stays and is refused later."""
    if not isinstance(value, str) or name not in (*FLOATS, *WHOLE):
        return value
    try:
        return int(value) if name in WHOLE else float(value)
    except ValueError:
        return value


class Answers(Job):
    """A request in the engine. Streamed, each token's text is an answer; else there is one, of all texts."""

    def __init__(
        self, service: "Service", prompts: list[list[int]], params: SamplingParams, n: int, scheduling: dict[str, Any],
        wanted: set[str], given: list[str], streamed: bool,
    ) -> None:  # fmt: skip
        engine: Any = service.engine
        self.max_tokens = n * sum(engine.check(prompt, params) for prompt in prompts)
        self.prompt_tokens = sum(map(len, prompts))
        self.service, self.prompts, self.params, self.n = service, prompts, params, n
        self.scheduling, self.wanted, self.given, self.streamed = scheduling, wanted, given, streamed
        self.generation: Generation | None = None

    def begin(self) -> None:
        engine: Any = self.service.engine
        if self.record is not None:
            texts = [self.service.tokenizer.decode(prompt) for prompt in self.prompts]
            self.record.asked(prompts=texts, n=self.n, stream=self.streamed)
        self.generation = Generation(
            engine, self.service.metrics, self.prompts, self.params, self.n, self.meter, self.record, **self.scheduling
        )  # fmt: skip

    async def answers(self) -> AsyncGenerator[Tensors, None]:
        assert self.generation is not None
        events: list[list[TokenEvent]] = [[] for _ in self.generation.requests]
        async for index, event in self.generation:
            check(self.service.engine, event)
            events[index].append(event)
            if self.streamed and (event.text or event.finish_reason or "output_ids" in self.wanted):
                yield self.tensors(events, event.text)
                events[index].clear()
        if not self.streamed:
            yield self.tensors(events)

    def end(self, outcome: str) -> Usage:
        if self.generation is None:
            return Usage(outcome=outcome)
        self.generation.cancel()
        self.service.metrics.observe_times(self.generation.requests)
        return self.generation.used(outcome)

    def tensors(self, events: list[list[TokenEvent]], delta: str | None = None) -> Tensors:
        """The outputs that are wanted, over the events since the last ones."""
        texts = ["".join(event.text for event in each) for each in events] if delta is None else [delta]
        if self.given:
            texts = [self.given[index // self.n] + text for index, text in enumerate(texts)]
        ids = [[event.id for event in each if event.id is not None] for each in events]
        made: dict[str, Any] = {
            "text_output": texts,
            # "None" while there is none, as the vLLM backend writes it
            "finish_reason": [str(each[-1].finish_reason) for each in events],
            "cumulative_logprob": [math.fsum(event.logprob for event in each if event.id is not None)
                                   for each in events],
            "logprobs": [json.dumps([self.described(event) for event in each if event.id is not None])
                         for each in events],
            "num_input_tokens": [self.prompt_tokens],
            "num_cached_tokens": [self.generation.cached_tokens if self.generation else 0],
            "num_output_tokens": [len(each) for each in ids],
            "output_ids": ids[0],
        }  # fmt: skip
        return {name: as_datatype(made[name], DATATYPES[name]) for name in self.wanted}

    def described(self, event: TokenEvent) -> dict[str, dict[str, Any]]:
        """A token's log-probabilities, by id, in the form of the vLLM backend."""
        names = self.service.names
        ranks = {token: place for place, (token, _) in enumerate(event.top_logprobs, 1)}
        known = {int(event.id or 0): event.logprob} | dict(event.top_logprobs)
        return {
            str(token): {"logprob": value, "rank": ranks.get(token), "decoded_token": names.text_of(token)}
            for token, value in known.items()
        }  # fmt: skip
