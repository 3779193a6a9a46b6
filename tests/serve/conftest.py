"""One service on a tiny model, in a subprocess of its own, for all tests of the room."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres import running_postgres
from tiny import make_model

from soma.engine.engine import Engine
from soma.engine.load import load_weights
from soma.serve.app import create_app
from soma.serve.calls import Gates
from soma.serve.database import Database
from soma.serve.gateway import Gateway
from soma.serve.running import running_service

# The service's own words go to a file; one thread, since two only wait for each other on tiny models.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server; `new_database` makes a database of a test's own."""
    with running_postgres() as url:
        yield url


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough that a full context takes seconds: time to leave, stop and queue in."""
    return make_model(tmp_path_factory.mktemp("chat"), num_hidden_layers=16)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return make_model(tmp_path_factory.mktemp("base"), chat=False)


# As Qwen's: tools as JSON, calls between marks, what tools said in turns of their own.
TOOL_TEMPLATE = """
{%- if tools %}<|system|>Call functions by <tool_call>{"name": …, "arguments": …}</tool_call>:
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="session")
def tools_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template knows tools."""
    folder = make_model(tmp_path_factory.mktemp("tools"))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TOOL_TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def tools_url(tools_folder: Path) -> Iterator[str]:
    with running_service(tools_folder) as url:
        yield url


@pytest.fixture(scope="session")
def service_url(tiny_folder: Path) -> Iterator[str]:
    with running_service(tiny_folder, max_running=4, max_waiting=8) as url:
        yield url


@pytest.fixture(scope="session")
def base_url(base_folder: Path) -> Iterator[str]:
    with running_service(base_folder) as url:
        yield url


@pytest.fixture(scope="session")
def key_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Keys and ledger in a database of their own."""
    where = str(tmp_path_factory.mktemp("keys") / "keys.db")
    Database(where).close()
    made = Gateway(where)
    yield made
    made.close()


@pytest.fixture(scope="session")
def keyed_app(key_gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The application in this process, which asks for keys; its engine too."""
    model, tokenizer = load_weights(make_model(tmp_path_factory.mktemp("kept")), precision="fp32", device="cpu")
    engine = Engine(model, tokenizer, max_running=4)
    yield create_app(engine, tokenizer, "tiny", gates=Gates(key_gateway.gates()), guard=key_gateway.guard)
    engine.close()
