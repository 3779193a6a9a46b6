"""`soma chat`, `soma serve`, `soma generate`."""

from pathlib import Path
from typing import Annotated

import typer

from soma.base import progress

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hf:ID or registry:NAME@VERSION.")]


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name that clients ask for; left out, the folder's.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="Longest prompt and answer together, in tokens.")] = None,
    max_running: Annotated[int, typer.Option(help="Requests answered at once.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429 with Retry-After.")] = 256,
    weights: Annotated[
        str | None, typer.Option(help="int8 or int4: round the weights at load, in groups of 32.")
    ] = None,
    cache_dtype: Annotated[
        str, typer.Option(help="int8 (CPU) or fp8 (GPU): a smaller cache of keys and values; auto: as the model.")
    ] = "auto",
    speculate: Annotated[
        str | None, typer.Option(help="Guess tokens, check several at once: ngram, or a small model.")
    ] = None,
    draft_tokens: Annotated[int | None, typer.Option(help="Tokens guessed at once, at most.", min=1)] = None,
    replicas: Annotated[int, typer.Option(help="Engines with a copy of the model each, behind one address.")] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="Processes (GPUs) that split each layer between them.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Stages of layers, in processes (on GPUs) of their own.")] = 1,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="A LoRA adapter, served as model NAME; repeat it.")
    ] = None,
    allow_adapter_loading: Annotated[
        bool, typer.Option("--allow-adapter-loading", help="Let clients load adapters from folders of this machine.")
    ] = False,
    allow_public: Annotated[
        bool,
        typer.Option("--allow-public", help="Let other machines reach the service though it asks nobody for a key."),
    ] = False,
    keys: Annotated[
        str | None, typer.Option(metavar="DATABASE", help="Ask for keys: a file or postgresql://… of `soma keys`.")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Open Inference Protocol over gRPC on this port as well (Triton's is 8001).")
    ] = None,
    grpc_compression: Annotated[str, typer.Option(help="Of gRPC answers: none, gzip or deflate.")] = "none",
    models: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file with further models: Python, ONNX, encoders.")
    ] = None,
    allow_model_control: Annotated[
        bool, typer.Option("--allow-model-control", help="Let clients load and unload the models of that file.")
    ] = False,
    limits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML: rate limits, in this process or in Redis.")
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="Believe X-Forwarded-For from this address or network; repeat it."),
    ] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML: what a million tokens of each model cost; with --keys.")
    ] = None,
    durability: Annotated[
        str, typer.Option(help="What the ledger's row of a call outlives from the call's start: process or power.")
    ] = "process",
    admin_port: Annotated[
        int | None, typer.Option(help="Admin API and page on this port as well; with --keys.", min=0)
    ] = None,
    admin_host: Annotated[str, typer.Option(help="Address of the admin port.")] = "127.0.0.1",
    prompts: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Prompts that requests may name: see `soma prompt`.")
    ] = None,
    request_log: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep what is asked and answered there, in Parquet; takes feedback too."),
    ] = None,
    request_log_sample: Annotated[float, typer.Option(help="Share of the requests that is kept.", min=0, max=1)] = 1.0,
    request_log_raw: Annotated[
        bool, typer.Option("--request-log-raw", help="Keep personal data and secrets as they came, not masked.")
    ] = False,
    request_log_seconds: Annotated[float, typer.Option(help="What one file of the log holds at most.")] = 60.0,
    index: Annotated[
        str | None, typer.Option(metavar="PATH_OR_URL", help="Answer chats from this index of `soma index`.")
    ] = None,
    rerank: Annotated[
        str | None, typer.Option(metavar="URL#MODEL", help="Sort what the index finds by /rerank of this address.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run the engine in this process, to debug it.")
    ] = False,
) -> None:
    """Serve a model: OpenAI API under /v1, a chat page at /, /health, /metrics."""
    from soma.serve.options import ServeOptions, parse_adapters
    from soma.serve.server import serve as serve_model

    with progress.use(progress.choose()):
        options = ServeOptions(
            host=host, port=port, name=name, allow_public=allow_public, precision=precision, device=device,
            max_length=max_length, max_running=max_running, max_waiting=max_waiting, weights=weights,
            cache_dtype=cache_dtype, replicas=replicas, speculate=speculate, draft_tokens=draft_tokens,
            tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, in_process=in_process,
            adapters=parse_adapters(adapter or []), allow_adapter_loading=allow_adapter_loading,
            keys=keys, prices=prices, durability=durability, admin_port=admin_port, admin_host=admin_host,
            request_log=request_log, request_log_sample=request_log_sample, request_log_redact=not request_log_raw,
            request_log_seconds=request_log_seconds,
            grpc_port=grpc_port, grpc_compression=grpc_compression, models=models,
            allow_model_control=allow_model_control, limits=limits, trusted_proxies=trusted_proxy or (),
            index=index, rerank=rerank, prompts=prompts,
        )  # fmt: skip
        serve_model(model, options)


def chat(
    model: Model,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Talk to a model in the terminal."""
    from soma.serve.terminal import chat as chat_with

    chat_with(model, max_tokens=max_tokens, temperature=temperature, seed=seed)


def generate(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL or Parquet with a prompt or messages column.")],
    out: Annotated[Path | None, typer.Option(help="Where answers go; left out, beside FILE as NAME.answers.*")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that reach this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given again.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_running: Annotated[int, typer.Option(help="Rows answered at once.")] = 64,
    weights: Annotated[
        str | None, typer.Option(help="int8 or int4: round the weights at load, in groups of 32.")
    ] = None,
    speculate: Annotated[
        str | None, typer.Option(help="Guess tokens, check several at once: ngram, or a small model.")
    ] = None,
    draft_tokens: Annotated[int | None, typer.Option(help="Tokens guessed at once, at most.", min=1)] = None,
    adapter: Annotated[str | None, typer.Option(metavar="FOLDER", help="A LoRA adapter to answer with.")] = None,
) -> None:
    """Answer every row of a file. Interrupted, the same command goes on where it was."""
    from soma.engine.load import load_engine
    from soma.engine.offline import generate_file
    from soma.engine.params import SamplingParams
    from soma.engine.prompts import encode_prompt

    target = out or file.with_name(f"{file.stem}.answers{file.suffix}")
    params = SamplingParams(
        temperature=temperature, top_p=top_p, seed=seed, stop=tuple(stop or ()), max_tokens=max_tokens
    )
    with progress.use(progress.choose()) as reporter:
        engine, tokenizer, name = load_engine(
            model, precision=precision, device=device, max_running=max_running, max_waiting=max_running,
            weights=weights, speculate=speculate,
            **({} if draft_tokens is None else {"draft_tokens": draft_tokens}),
        )  # fmt: skip
        try:
            if adapter is not None:
                engine.load_adapter(adapter, adapter)
            # Speculation is not part of it: it changes how fast answers come, not what they are drawn from.
            identity = " ".join(filter(None, (name, precision, weights, adapter)))
            summary = generate_file(engine, tokenizer, file, target, params, encode_prompt, identity, adapter)
        finally:
            engine.close()
        made = summary.rows - len(summary.failed)
        reporter.note(f"{made} answers, {summary.completion_tokens} tokens: {target}")
