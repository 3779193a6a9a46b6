"""The openai client, unchanged, against a real service."""

import asyncio
import math
from typing import Any

import openai
import pytest

MODEL = "tiny"
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(service_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=service_url + "/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "soma"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/one")
    assert caught.value.code == "model_not_found"


def test_chat_whole_and_streamed_say_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, seed=4)
    assert whole.object == "chat.completion"
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (20, whole.usage.prompt_tokens + 20)

    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=20, seed=4, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1

    plain = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_several_choices(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, n=3, seed=1)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in done.choices}) == 3
    again = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, seed=2)
    assert again.choices[0].message.content == done.choices[1].message.content
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, n=3, seed=1, stream=True
    ):  # fmt: skip
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [choice.message.content for choice in done.choices]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 12
    joined = b"".join(bytes(row.bytes or []) for row in logprobs.content)
    assert joined.decode(errors="replace") == done.choices[0].message.content
    for row in logprobs.content:
        assert row.token == row.top_logprobs[0].token  # greedy
        assert row.logprob == row.top_logprobs[0].logprob <= 0
        assert [top.logprob for top in row.top_logprobs] == sorted((t.logprob for t in row.top_logprobs), reverse=True)
    chunks = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    rows = [
        row for chunk in chunks if chunk.choices[0].logprobs for row in chunk.choices[0].logprobs.content or []
    ]  # fmt: skip
    assert rows == logprobs.content


def test_completions_of_every_prompt_form(client: openai.OpenAI) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        done = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0, **more)
        return [choice.text for choice in done.choices]

    one, other = texts("hello")[0], texts("the fox")[0]
    assert texts(["hello", "the fox"]) == [one, other]
    assert texts(["hello", "the fox"], n=2) == [one, one, other, other]
    scored = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=1, temperature=0, echo=True, logprobs=1
    ).choices[0]
    assert scored.logprobs is not None
    ids = list(scored.logprobs.tokens or [])
    assert "".join(ids[:-1]) == "hello"
    assert texts("hello", echo=True) == ["hello" + one]
    assert texts([5, 6, 7]) == texts([[5, 6, 7], [5, 6, 7]])[:1]
    assert texts([5, 6, 7], echo=True)[0].endswith(texts([5, 6, 7])[0])
    default = client.completions.create(model=MODEL, prompt="hello", temperature=0)
    assert default.usage is not None
    assert default.usage.completion_tokens <= 16


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI) -> None:
    def one(**more: Any) -> Any:
        return client.completions.create(
            model=MODEL, prompt="hello world", max_tokens=2, temperature=0, echo=True, logprobs=2, **more
        )

    logprobs = one().choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    chunks = [chunk.choices[0].logprobs for chunk in one(stream=True) if chunk.choices[0].logprobs]
    assert [token for chunk in chunks for token in chunk.tokens] == logprobs.tokens
    assert [value for chunk in chunks for value in chunk.token_logprobs] == logprobs.token_logprobs
    assert [value for chunk in chunks for value in chunk.text_offset] == logprobs.text_offset


def test_stop_strings_and_penalties(client: openai.OpenAI) -> None:
    def text(**more: Any) -> tuple[str, str]:
        choice = client.completions.create(model=MODEL, prompt="hello", max_tokens=40, temperature=0, **more).choices[0]
        return choice.text, choice.finish_reason

    whole, _ = text()
    stop = whole[10:13]
    for given in (stop, [stop, "never there"]):
        assert text(stop=given) == (whole[: whole.index(stop)], "stop")
    streamed = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=40, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole[: whole.index(stop)]
    assert text(frequency_penalty=2.0, presence_penalty=2.0)[0] != whole
    assert text(extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0})[0] == whole
    forced = client.completions.create(model=MODEL, prompt="hello", max_tokens=3, logit_bias={"70": 100}, logprobs=0)
    assert forced.choices[0].logprobs is not None
    assert len(set(forced.choices[0].logprobs.tokens or [])) == 1
    held = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=3, logit_bias={"70": 100}, logprobs=0, extra_body={"bad_words": [[70]]}
    )
    assert held.choices[0].logprobs is not None
    assert set(held.choices[0].logprobs.tokens or []).isdisjoint(forced.choices[0].logprobs.tokens or [])


def test_messages_in_all_their_forms(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5, temperature=0)
    history: Any = [*HELLO, first.choices[0].message.model_dump(), {"role": "user", "content": "and now?"}]
    assert client.chat.completions.create(model=MODEL, messages=history, max_tokens=3).choices
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    same = client.chat.completions.create(model=MODEL, messages=parts, max_completion_tokens=5, temperature=0)
    assert same.choices[0].message.content == first.choices[0].message.content
    assert client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=3, user="me", store=False, metadata={"a": "b"}, tools=[],
        response_format={"type": "text"},
    ).choices  # fmt: skip


def test_async_client_many_at_once(service_url: str) -> None:
    """More than run at once; every stream gives what the request gives alone."""

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=service_url + "/v1", api_key="none", max_retries=0) as client:

            async def one(seed: int, stream: bool) -> str:
                if not stream:
                    done = await client.completions.create(model=MODEL, prompt="the", max_tokens=15, seed=seed)
                    return done.choices[0].text
                chunks = await client.completions.create(
                    model=MODEL, prompt="the", max_tokens=15, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in chunks])

            together = await asyncio.gather(*(one(seed, True) for seed in range(10)))
            alone = [await one(seed, False) for seed in range(10)]
            assert together == alone
            return together

    assert len(set(asyncio.run(run()))) == 10


def test_errors_are_openai_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 4096)
    assert (long.value.param, long.value.code) == ("prompt", "context_length_exceeded")
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model=MODEL, messages=HELLO, tools=[tool])
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as suffix:
        client.completions.create(model=MODEL, prompt="a", suffix="b")
    assert suffix.value.param == "suffix"


def test_a_model_without_chat_template(base_url: str) -> None:
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == "no_chat_template"
    done = client.completions.create(model=MODEL, prompt="", max_tokens=4, logprobs=0)
    assert done.choices[0].logprobs is not None
    assert all(math.isfinite(value) for value in done.choices[0].logprobs.token_logprobs or [])
