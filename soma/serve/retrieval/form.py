"""How clients say what they search for."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from soma.serve.retrieval.search import MOST, Mode

MAX_QUESTION = 32_768  # characters that are searched for


class Search(BaseModel):
    """How to search."""

    model_config = ConfigDict(strict=True, extra="forbid")
    limit: int = Field(5, ge=1, le=MOST)
    mode: Mode = "hybrid"
    where: dict[str, Any] = Field({}, description="source (a file or folder), kind, title, meta.KEY: a value or a list")


class SearchRequest(Search):
    """Body of POST /v1/search."""

    query: str = Field(min_length=1, max_length=MAX_QUESTION)
