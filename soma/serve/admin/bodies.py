"""What the admin API is sent."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Bodies: nothing is converted, nothing unknown is taken."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class NewKey(Strict):
    """Body of POST /api/keys."""

    name: str
    team: str | None = None
    role: str = "use"
    models: list[str] | None = None
    routes: list[str] | None = None
    priority: int = 0
    days: float | None = None


class Rotation(Strict):
    """Body of POST /api/keys/ID/rotate: seconds for which the old secret is still good."""

    grace: float = 0.0


class Expiry(Strict):
    """Body of POST /api/keys/ID/expire: days from now; 0: at once."""

    days: float


class NewTeam(Strict):
    """Body of POST /api/teams."""

    name: str


class NewBudget(Strict):
    """Body of PUT /api/budgets; money as text, so that it is exact. Both null: no bound any more."""

    owner: str
    period: str
    tokens: int | None = None
    money: str | None = None


class Empty(Strict):
    """The body of what needs none."""


class ServiceKey(Strict):
    """Body of POST /api/playground/models: a key of the model service."""

    key: str = Field(pattern="^[!-~]+$", max_length=200)


class Turn(Strict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class PlaygroundChat(ServiceKey):
    """Body of POST /api/playground/chat."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    temperature: float
    max_tokens: int
