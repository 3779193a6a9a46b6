"""POST /v1/feedback: what a client thinks of an answer, by the request's id (`x-request-id` of the answer).

Feedback belongs to the key that gives it. Joined with the log it counts only if the request was that key's.
"""

from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from soma.serve.calls import caller_of
from soma.serve.errors import ApiError
from soma.serve.requestlog.gate import RequestLog
from soma.serve.tokens import read_as

MOST_BYTES = 1 << 20


class FeedbackRequest(BaseModel):
    """Body of POST /v1/feedback. The last one for a request's answer counts."""

    model_config = ConfigDict(strict=True, extra="forbid")
    request_id: str = Field(pattern=r"^req-[0-9a-f]{24}$", description="x-request-id of the answer")
    choice: int = Field(0, ge=0, le=4095, description="which answer, of several")
    rating: Literal["up", "down"] | None = None
    correction: str | None = Field(None, min_length=1, description="what the answer should have been")
    comment: str | None = Field(None, max_length=4096)


def install(app: FastAPI, request_log: RequestLog | None) -> None:
    """Add the route. Without a request log it says that there is none."""

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> dict[str, Any]:
        if request_log is None:
            raise ApiError(404, "this service keeps no request log, so there is nothing that feedback could go with",
                           code="no_request_log")  # fmt: skip
        body = await read_as(request, FeedbackRequest, MOST_BYTES)
        if body.rating is None and body.correction is None and body.comment is None:
            raise ApiError(400, "give a rating, a correction or a comment", "rating", "missing_required_parameter")
        request_log.feedback(caller_of(request), body.model_dump())
        return {"object": "feedback", "request_id": body.request_id, "choice": body.choice}
