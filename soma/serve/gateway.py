"""What `soma serve --keys` puts before the model."""

from soma.serve.calls import Gate
from soma.serve.database import Database
from soma.serve.keys.door import Guard, ModelScope
from soma.serve.keys.keyring import Keyring


class Gateway:
    """The database of keys and what reads it while the service runs. Raises UserError."""

    def __init__(self, database: str) -> None:
        self.database = Database(database, create=False)
        self.keyring = Keyring(self.database)
        self.guard = Guard(self.keyring)
        self.gates: list[Gate] = [ModelScope()]

    def close(self) -> None:
        self.keyring.close()
        self.database.close()
