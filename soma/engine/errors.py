"""Why the engine did not take a request."""

from soma.base.errors import UserError


class RequestError(UserError):
    """A request that asks for something impossible. `param` names the field, so that a front can pass it on."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


def unknown_model(name: str) -> RequestError:
    """What a request for a model or an adapter that is not there gets."""
    return RequestError(f"The model `{name}` does not exist", "model", "model_not_found")


class QueueFullError(RuntimeError):
    """The bounded queue has no place. `retry_after` is a guess in seconds from the load at this moment."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"the queue is full ({waiting} requests wait); try again in {retry_after} s")
        self.retry_after = retry_after


class EngineClosedError(RuntimeError):
    """The engine is shutting down and takes no more requests."""


class EngineRestartingError(EngineClosedError):
    """The engine's process ended and comes up again by itself. `retry_after`: seconds until it should be there."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the engine is being restarted; try again in {retry_after} s")
        self.retry_after = retry_after
