"""The block `features` of a node in an inference graph: a lookup at a feature server.

    facts:
      features:
        url: "http://127.0.0.1:6566"                     # `soma features serve`, or any Feast feature server
        entities: {question: BYTES}                      # tensors of the request that are the keys
        get: {"answer:answer": BYTES, "answer:since": BYTES}
        defaults: {"answer:answer": unknown}             # of what is not there; without one that is an error
        fill: {text_input: "{{ question }} As of {{ since }}: {{ answer }}."}

Features are put on the board under their names (`answer`, `since`), and so are the texts of `fill`.
"""

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from soma.serve.graphs.kinds import NodeKind, Place
from soma.serve.v2.config import Datatype

if TYPE_CHECKING:
    from soma.serve.v2.model import V2Model


class Lookup(NodeKind):
    """What to look up, by what."""

    url: str = Field(pattern="^https?://")
    entities: dict[str, Datatype] = Field(min_length=1, description="keys of the features, and tensors of the request")
    get: dict[str, Datatype] = Field(min_length=1, description="VIEW:FEATURE and its datatype")
    defaults: dict[str, Any] = Field({}, description="VIEW:FEATURE and its value where there is none")
    key_env: str | None = Field(None, description="environment variable with the key of the feature server")
    fill: dict[str, str] = Field({}, description="text tensors made of keys and features, as Jinja templates")

    @field_validator("get")
    @classmethod
    def are_references(cls, given: dict[str, str]) -> dict[str, str]:
        """VIEW:FEATURE, with names that differ."""
        for reference in given:
            view, sign, feature = reference.partition(":")
            if not (view and sign and feature.isidentifier()):
                raise ValueError(f"{reference!r}: expected VIEW:FEATURE")
        return given

    @model_validator(mode="after")
    def names_differ(self) -> "Lookup":
        """No name stands for two tensors; defaults are of what is looked up."""
        names = [*self.entities, *(name_of(reference) for reference in self.get), *self.fill]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} stands for two tensors")
        if strange := [reference for reference in self.defaults if reference not in self.get]:
            raise ValueError(f"defaults: {strange[0]} is not looked up")
        return self

    def build(self, place: Place) -> "V2Model":
        """The node. Raises UserError."""
        from soma.serve.features.online import FeatureLookup

        return FeatureLookup(self)


def name_of(reference: str) -> str:
    """FEATURE of VIEW:FEATURE."""
    return reference.partition(":")[2]
