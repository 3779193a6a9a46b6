"""What tokens cost: a YAML file that a person keeps.

    currency: USD
    models:
      tiny: {prompt: 0.15, cached: 0.075, completion: 0.60}   # per million tokens

`cached` (prompt tokens that the cache held) costs what `prompt` does if left out; the others must be there. A model
that is not in the file has no price, which is an error and never 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import yaml

from soma.base.errors import UserError

NANO_PER_MILLIONTH = 1000  # a price per million tokens is so many billionths per token
FIELDS = ("prompt", "cached", "completion")


@dataclass(frozen=True)
class Price:
    """Per million tokens."""

    prompt: Decimal
    cached: Decimal
    completion: Decimal


@dataclass(frozen=True)
class Prices:
    """The price file."""

    currency: str
    models: dict[str, Price]
    path: str

    def check(self, names: Iterable[str]) -> None:
        """Raises UserError naming models that have no price."""
        if missing := [name for name in names if name not in self.models]:
            raise UserError(f"{self.path}: no price for {', '.join(map(repr, missing))}; add models.NAME.prompt and "
                            ".completion, per million tokens")  # fmt: skip

    def cost(self, model: str, prompt: int, cached: int, completion: int) -> int:
        """Billionths of the currency; KeyError where there is no price.

        `cached` of the `prompt` tokens were in the cache. 1,000 prompt tokens at 0.15 per million and 200 completion
        tokens at 0.60 are 150,000 + 120,000 billionths.
        """
        price = self.models[model]
        exact = (prompt - cached) * price.prompt + cached * price.cached + completion * price.completion
        return int((exact * NANO_PER_MILLIONTH).to_integral_value(ROUND_HALF_EVEN))

    def most(self, model: str, prompt: int, completion: int) -> int:
        """The most that a call can cost, whatever the cache holds."""
        return max(self.cost(model, prompt, 0, completion), self.cost(model, prompt, prompt, completion))


def load_prices(path: str) -> Prices:
    """Read a price file. Raises UserError: file, key, and what is expected there."""
    try:
        given = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Exact)
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(given, dict) or set(given) != {"currency", "models"}:
        raise UserError(f"{path}: expected `currency` and `models`, and nothing else")
    currency, models = given["currency"], given["models"]
    if not isinstance(currency, str) or not (currency.isascii() and currency.isalpha() and len(currency) == 3):
        raise UserError(f"{path}: currency: expected three letters, as USD")
    if not isinstance(models, dict):
        raise UserError(f"{path}: models: expected names with their prices")
    return Prices(currency.upper(), {str(name): _price(path, str(name), models[name]) for name in models}, path)


def _price(path: str, name: str, given: Any) -> Price:
    where = f"{path}: models.{name}"
    if not isinstance(given, dict) or set(given) not in (set(FIELDS), {"prompt", "completion"}):
        raise UserError(f"{where}: expected prompt and completion, and perhaps cached, per million tokens")
    for field, value in given.items():
        if not isinstance(value, Decimal) or not 0 <= value < 10**9:
            raise UserError(f"{where}.{field}: expected a number, 0 or more")
    found: dict[str, Decimal] = {"cached": given["prompt"], **given}
    return Price(**found)


class _Exact(yaml.SafeLoader):
    """YAML whose numbers are decimals as written: 0.1 is a tenth."""


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Decimal:
    try:
        return Decimal(node.value.replace("_", ""))
    except ArithmeticError:
        raise yaml.constructor.ConstructorError(None, None, f"{node.value!r} is no decimal number",
                                                node.start_mark) from None  # fmt: skip


_Exact.add_constructor("tag:yaml.org,2002:float", _decimal)
_Exact.add_constructor("tag:yaml.org,2002:int", _decimal)
