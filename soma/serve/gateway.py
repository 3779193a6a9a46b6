"""What `soma serve --keys` puts before the model: the door, the keys' scopes, the ledger."""

from collections.abc import Iterable

from soma.serve.calls import Gate
from soma.serve.database import Database
from soma.serve.keys.door import Guard, ModelScope
from soma.serve.keys.keyring import Keyring
from soma.serve.ledger.gate import Ledger
from soma.serve.ledger.prices import load_prices


class Gateway:
    """The database of keys and ledger, and what works on it while the service runs.

    prices: a price file; without it tokens are counted and money is not. Raises UserError.
    """

    def __init__(self, database: str, prices: str | None = None) -> None:
        self.prices = None if prices is None else load_prices(prices)
        self.database = Database(database, create=False)
        self.keyring = Keyring(self.database)
        self.guard = Guard(self.keyring)
        try:
            self.ledger = Ledger(self.database, self.keyring, self.prices)
        except BaseException:
            self.keyring.close()
            self.database.close()
            raise

    def gates(self, others: Iterable[Gate] = ()) -> list[Gate]:
        """In the order that calls pass them: what is cheap to refuse first, the ledger's row last."""
        return [ModelScope(), *others, self.ledger]

    def check_models(self, names: Iterable[str]) -> None:
        """Raises UserError for a model that is served and has no price."""
        if self.prices is not None:
            self.prices.check(names)

    def close(self) -> None:
        """After the last call has ended."""
        self.ledger.close()
        self.keyring.close()
        self.database.close()
