"""What a generation is told."""

from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any, Literal

Method = Literal["self-instruct", "evol-instruct"]


@dataclass(frozen=True)
class Budget:
    """What may be spent; None: any. `money` in the currency of the prices, which are for a million tokens."""

    requests: int | None = None
    tokens: int | None = None
    money: Decimal | None = None
    price_in: Decimal = Decimal(0)
    price_out: Decimal = Decimal(0)

    def cost(self, tokens_in: int, tokens_out: int) -> Decimal:
        """Worked example: 1,000 in at 0.5 and 200 out at 1.5 a million cost 0.0008."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / Decimal(1_000_000)


@dataclass(frozen=True)
class Settings:
    """One generation. The rows depend on all but `concurrency` and `budget`, which may change when it is resumed."""

    method: Method
    model: str
    url: str
    api_key_env: str | None = None
    seed: int = 0
    temperature: float = 0.7
    max_tokens: int = 1024
    rows: int | None = None
    epochs: int = 4
    novelty: float = 0.7
    round: int = 16
    idle_rounds: int = 20
    near: float = 0.8
    decontaminate: tuple[str, ...] = ()
    concurrency: int = 8
    budget: Budget = field(default_factory=Budget)

    def identity(self) -> dict[str, Any]:
        """What must be the same when a folder is resumed, as JSON."""
        resumable = {"concurrency", "budget", "rows", "url", "api_key_env", "near", "decontaminate", "epochs"}
        return {key: value for key, value in asdict(self).items() if key not in resumable}
