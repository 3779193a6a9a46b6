"""The service beside which the admin API listens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from soma.serve.limits.gate import LimitsGate

if TYPE_CHECKING:
    from soma.serve.graphs.graph import Graph
    from soma.serve.requestlog.gate import RequestLog


@dataclass(frozen=True)
class Beside:
    """What of a service the admin page shows, as far as it is there. chat_url: its base URL, if it answers chats."""

    limiter: LimitsGate | None = None
    request_log: "RequestLog | None" = None
    graphs: "Mapping[str, Graph]" = field(default_factory=dict)
    chat_url: str | None = None
