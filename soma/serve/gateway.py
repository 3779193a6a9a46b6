"""What `soma serve --keys` puts before the model: the door, the keys' scopes, the ledger."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from soma.serve.calls import Gate
from soma.serve.database import Database
from soma.serve.keys.door import Guard, ModelScope
from soma.serve.keys.keyring import Keyring
from soma.serve.ledger.gate import Ledger
from soma.serve.ledger.prices import load_prices

if TYPE_CHECKING:
    from soma.serve.admin.api import AdminServer
    from soma.serve.admin.beside import Beside


class Gateway:
    """The database of keys and ledger, and what works on it while the service runs.

    prices: a price file; without it tokens are counted and money is not. durability: see `Ledger`. Raises UserError.
    """

    def __init__(self, database: str, prices: str | None = None, durability: str = "process") -> None:
        self.prices = None if prices is None else load_prices(prices)
        self.database = Database(database, create=False)
        self.keyring = Keyring(self.database)
        self.guard = Guard(self.keyring)
        self.admin: AdminServer | None = None
        try:
            self.ledger = Ledger(self.database, self.keyring, self.prices, durability)
        except BaseException:
            self.keyring.close()
            self.database.close()
            raise

    @property
    def currency(self) -> str | None:
        """Of the price file."""
        return self.prices.currency if self.prices else None

    def gates(self, others: Iterable[Gate] = ()) -> list[Gate]:
        """In the order that calls pass them: what is cheap to refuse first, the ledger's row last."""
        return [ModelScope(), *others, self.ledger]

    def check_models(self, names: Iterable[str]) -> None:
        """Raises UserError for a model that is served and has no price."""
        if self.prices is not None:
            self.prices.check(names)

    def start_admin(self, host: str, port: int, beside: "Beside") -> str:
        """Start the admin API of a service; its URL. Raises UserError."""
        from soma.serve.admin.api import AdminServer

        self.admin = AdminServer(self, host, port, beside)
        return self.admin.url

    def close(self) -> None:
        """After the last call has ended."""
        if self.admin is not None:
            self.admin.close()
        self.ledger.close()
        self.keyring.close()
        self.database.close()
