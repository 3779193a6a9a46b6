"""What a service needs to search: off the event loop, and with errors that say whose they are."""

import asyncio
import logging
import os

from soma.base.errors import UserError
from soma.serve.errors import ApiError
from soma.serve.retrieval.search import Hit, Mode, Retriever
from soma.serve.retrieval.store import InputError, Where

log = logging.getLogger("soma.serve")


async def search(retriever: Retriever, question: str, limit: int, mode: Mode, where: Where | None) -> list[Hit]:
    """The hits. Raises ApiError: 400 for what was asked wrong, 503 if the index, its encoder or reranker is away."""
    try:
        return await asyncio.to_thread(retriever.search, question, limit, mode, where)
    except InputError as error:
        raise ApiError(400, str(error)) from None
    except UserError as error:
        log.error("retrieval failed: %s", error)  # addresses and counts, nothing of the question
        raise ApiError(
            503, "retrieval is not available; try again soon", code="retrieval_away", retry_after=5
        ) from None


def key_of(variable: str | None) -> str | None:
    """The value of an environment variable that was named. Raises UserError if it is not set."""
    if variable is not None and variable not in os.environ:
        raise UserError(f"the environment variable {variable} is not set")
    return os.environ[variable] if variable else None
