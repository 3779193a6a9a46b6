"""Checks as YAML says them. Each is one of: `injection`, `personal`, `moderation`, `grounded`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["email", "ip", "phone", "card", "iban", "secret"]


class Strict(BaseModel):
    """Unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid")


class Injection(Strict):
    """Prompt injection by its wording (`soma.serve.guards.injection`)."""

    threshold: float = Field(0.5, gt=0, le=1)


class Personal(Strict):
    """Personal data and secrets by their form (`soma.data.signals.personal`)."""

    kinds: list[Kind] = Field(["email", "ip", "phone", "card", "iban", "secret"], min_length=1)
    action: Literal["mask", "block"] = "mask"


class Moderation(Strict):
    """Any classifier of the service: texts in, labels or scores out."""

    model: str = Field(description="a model of the file, or GRAPH.NODE")
    input: str = Field("text", description="its input of texts, BYTES [N]")
    output: str = Field("label", description="its output: labels (BYTES [N]) or scores ([N, C], by the model's labels)")
    labels: list[str] = Field(min_length=1, description="that are stopped")
    threshold: float = Field(0.5, description="of scores")


class Grounded(Strict):
    """Every sentence of the text must stand in the passages (`soma.serve.guards.grounded`)."""

    threshold: float = Field(0.6, gt=0, le=1)


class Check(Strict):
    """One check. `action`: refuse the request, or only say so in `verdict`."""

    injection: Injection | None = None
    personal: Personal | None = None
    moderation: Moderation | None = None
    grounded: Grounded | None = None
    action: Literal["block", "flag"] = "block"

    @property
    def name(self) -> str:
        """Which it is."""
        return next(iter(self.chosen), "")

    @property
    def chosen(self) -> list[str]:
        return [name for name in ("injection", "personal", "moderation", "grounded") if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _one(self) -> "Check":
        if len(self.chosen) != 1:
            raise ValueError("a check is one of injection, personal, moderation, grounded")
        return self


class Guarded(Strict):
    """An edge: what a node says is checked while it says it."""

    node: str
    checks: list[Check] = Field(min_length=1)
    tensor: str = Field("text_output", description="the text that is checked")
    passages: str = Field("passages", description="the board's passages, for `grounded`")
    window: int = Field(512, ge=64, le=65_536, description="letters before the new ones that are looked at with them")
    step: int = Field(64, ge=1, le=65_536, description="new letters that are looked at together, and wait for it")

    @model_validator(mode="after")
    def _blocks(self) -> "Guarded":
        if any(check.action == "flag" for check in self.checks):
            raise ValueError("flag: an edge has no verdict to say it in; use a guard node behind the other")
        return self
