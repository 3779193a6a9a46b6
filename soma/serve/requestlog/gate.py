"""The request log as a gate: it gives a call the record that who answers fills, and keeps it when the call is over.

It is the last gate, so that what another refuses is not kept. Whether a request is sampled depends on its id alone.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from typing import Any

from prometheus_client import CollectorRegistry, Counter

from soma.serve.calls import Call, Caller, Usage
from soma.serve.requestlog.config import RequestLogConfig
from soma.serve.requestlog.record import Record
from soma.serve.requestlog.writer import TABLES, Writer

REMEMBERED = 1024  # calls that were not sampled, in case that feedback comes
REMEMBERED_BYTES = 16 << 20


class RequestLog:
    """The gate, the writer, and the feedback. Raises UserError."""

    def __init__(self, config: RequestLogConfig) -> None:
        self.config = config
        self.rows = Counter("soma:request_log_rows", "Rows in files of the request log.", ["table"], registry=None)
        self.dropped = Counter(
            "soma:request_log_dropped", "Requests and feedback that were not kept.", ["reason"], registry=None
        )
        self.errors = Counter("soma:request_log_errors", "Files that could not be written.", registry=None)
        self.lock = threading.Lock()
        self.remembered: OrderedDict[str, Record] = OrderedDict()
        self.remembered_bytes = 0
        self.writer = Writer(
            config.folder, rotate=config.rotate / 1000, rotate_bytes=config.rotate_bytes, redact=config.redact,
            on_written=lambda table, rows: self.rows.labels(table).inc(rows),
            on_dropped=lambda reason, records: self.dropped.labels(reason).inc(records), on_error=self.errors.inc,
        )  # fmt: skip
        for table in TABLES:
            self.rows.labels(table)

    def register(self, registry: CollectorRegistry) -> None:
        """Put the counters where Prometheus reads."""
        for each in (self.rows, self.dropped, self.errors):
            registry.register(each)

    def counts(self) -> dict[str, int]:
        """For the admin page: rows by table, what was dropped, files that failed."""
        rows = {table: total(self.rows.labels(table)) for table in TABLES}
        return {**rows, "dropped": total(self.dropped), "errors": total(self.errors)}

    async def enter(self, call: Call) -> "LogHold":
        call.record = Record(call, is_sampled=is_sampled(call.id, self.config.sample))
        return LogHold(self, call.record)

    def ended(self, record: Record, usage: Usage) -> None:
        """A call is over."""
        record.end(usage)
        if usage.outcome == "refused":
            return
        if not record.is_whole:
            if record.size:
                self.dropped.labels("too_long").inc()
            return
        if record.is_sampled:
            self.writer.put("requests", record.rows, record.size)
            return
        with self.lock:
            self.remembered[record.call.id] = record
            self.remembered_bytes += record.size
            while len(self.remembered) > REMEMBERED or self.remembered_bytes > REMEMBERED_BYTES:
                self.remembered_bytes -= self.remembered.popitem(last=False)[1].size

    def feedback(self, caller: Caller | None, value: dict[str, Any]) -> None:
        """Keep feedback, and the call that it is for if that was not sampled and is still known."""
        key_id = caller.key_id if caller else None
        row = {**value, "time": time.time_ns() // 1000, "key_id": key_id}
        self.writer.put("feedback", lambda: [row], sum(len(each) for each in row.values() if isinstance(each, str)))
        with self.lock:
            record = self.remembered.get(value["request_id"])
            if record is None or (record.call.caller.key_id if record.call.caller else None) != key_id:
                return
            del self.remembered[value["request_id"]]
            self.remembered_bytes -= record.size
        self.writer.put("requests", record.rows, record.size)

    def close(self) -> None:
        """After the last call."""
        self.writer.close()


class LogHold:
    """A call that is written down."""

    def __init__(self, request_log: RequestLog, record: Record) -> None:
        self.request_log, self.record = request_log, record
        self.headers: dict[str, str] = {}

    async def leave(self, usage: Usage) -> None:
        """Keep it."""
        self.request_log.ended(self.record, usage)


def is_sampled(request_id: str, share: float) -> bool:
    """Whether a request is among `share` of all."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) < share * (1 << 64)


def total(counter: Counter) -> int:
    """What a counter has counted, over all of its labels."""
    samples = (sample for metric in counter.collect() for sample in metric.samples)
    return int(sum(sample.value for sample in samples if sample.name.endswith("_total")))
