"""Waiting for the disk: one thread that syncs the journal for everybody who has written to it meanwhile."""

import asyncio
import logging
import queue
import threading

from soma.serve.ledger.book import Waiting, tell, unavailable
from soma.serve.ledger.journal import Journal

log = logging.getLogger("soma.serve")


class Syncer:
    """The thread and who waits for it. While a sync is under way the next group gathers; no timer holds anybody up."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="soma-journal", daemon=True)
        self.thread.start()

    async def written(self) -> None:
        """Returns when all that this task has written to the journal is on the disk. Raises ApiError 503."""
        loop = asyncio.get_running_loop()
        waiting = Waiting(loop, loop.create_future())
        self.queue.put(waiting)
        await waiting.future
        if waiting.verdict is not None:
            raise waiting.verdict

    def _run(self) -> None:
        is_failing = False
        while (first := self.queue.get()) is not None:
            group, ends = [first], False
            while not self.queue.empty():
                if (each := self.queue.get()) is None:
                    ends = True
                    break
                group.append(each)
            try:
                self.journal.sync()
                is_failing = False
            except OSError as error:
                if not is_failing:
                    log.error("the ledger's journal cannot be written: %s", error.strerror)
                is_failing = True
                for each in group:
                    each.verdict = unavailable()
            tell(group)
            if ends:
                return

    def close(self) -> None:
        """After the last call."""
        self.queue.put(None)
        self.thread.join()
