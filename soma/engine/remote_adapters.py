"""The adapters of an engine in another process: loaded there, remembered here, so that a new process has them too."""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from soma.base.errors import UserError
from soma.engine.errors import EngineRestartingError, unknown_model

if TYPE_CHECKING:
    from soma.engine.process import EngineProcess


class RemoteAdapters:
    """`folders`: the adapters that requests may choose, and where each was loaded from."""

    def __init__(self, process: "EngineProcess", folders: Mapping[str, str]) -> None:
        self.process = process
        self.folders = dict(folders)
        self.loading: dict[int, tuple[Future[None], str, str]] = {}
        self.unloading: dict[int, Future[None]] = {}

    def check(self, name: str | None) -> None:
        """Raises RequestError for an adapter that is not there."""
        if name is not None and name not in self.folders:
            raise unknown_model(name)

    def load(self, name: str, folder: str | Path) -> None:
        """As `Engine.load_adapter`; also raises EngineClosedError, EngineRestartingError."""
        future: Future[None] = Future()
        with self.process.lock:
            channel = self.process.open_channel()
            number = next(self.process.numbers)
            self.loading[number] = future, name, str(folder)
            channel.put("load_adapter", number, name, str(folder))
        future.result()

    def unload(self, name: str) -> None:
        """As `Engine.unload_adapter`; also raises EngineClosedError, EngineRestartingError."""
        future: Future[None] = Future()
        with self.process.lock:
            channel = self.process.open_channel()
            self.check(name)
            del self.folders[name]  # whoever asks from now on is refused here
            number = next(self.process.numbers)
            self.unloading[number] = future
            channel.put("unload_adapter", number, name)
        future.result()

    def settle(self, number: int, error: str | None, is_mistake: bool) -> None:
        """What the engine process answers. is_mistake: the error is the user's."""
        with self.process.lock:
            if number in self.loading:
                future, name, folder = self.loading.pop(number)
                if error is None:
                    self.folders[name] = folder
            else:
                future = self.unloading.pop(number)
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(UserError(error) if is_mistake else RuntimeError(error))

    def lose(self) -> None:
        """The engine process is gone, and with it what was to be unloaded."""
        with self.process.lock:
            loading, self.loading = list(self.loading.values()), {}
            unloading, self.unloading = list(self.unloading.values()), {}
        for future, _, _ in loading:
            future.set_exception(EngineRestartingError(self.process.retry_after))
        for future in unloading:
            future.set_result(None)
