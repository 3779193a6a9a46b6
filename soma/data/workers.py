"""The same function over many tasks: in this process, in several, or on a Ray cluster through Daft.

A task writes its own files and returns a small JSON value. Nothing depends on which worker does which task, or when.
"""

import json
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from soma.base.errors import UserError
from soma.base.parent import end_with_spawner

Runner = Literal["local", "ray"]


def map_tasks(
    function: Callable[[Any], Any], tasks: Sequence[Any], workers: int = 1, runner: Runner = "local"
) -> Iterator[tuple[int, Any]]:
    """(number of the task, its result) as they come. The function must be importable, tasks and results picklable;
    on Ray results must be JSON, and every node must see the folders that tasks name.

    Raises UserError where a worker process dies; the files of finished tasks stay.
    """
    if runner == "ray":
        yield from _on_ray(function, tasks, workers)
    elif workers == 1 or len(tasks) <= 1:
        yield from ((number, function(task)) for number, task in enumerate(tasks))
    else:
        yield from _in_processes(function, tasks, workers)


def _in_processes(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
    # Spawned, not forked: pyarrow, Daft and OpenMP have threads, which a fork would lose while they hold locks.
    context = multiprocessing.get_context("spawn")
    done = 0
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=end_with_spawner) as pool:
        futures = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
                done += 1
        except BrokenProcessPool:
            raise UserError(
                f"data.workers: a worker process died (killed, or out of memory) after {done} of {len(tasks)} parts. "
                "What is done is kept: run the same command again, with fewer workers if memory was short"
            ) from None
        finally:
            for future in futures:
                future.cancel()


def _on_ray(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
    """One Daft dataframe with a task in each partition, and a user function that does it."""
    import daft

    call = pickle.dumps(function)

    @daft.func
    def do(task: bytes) -> str:
        return json.dumps(pickle.loads(call)(pickle.loads(task)))

    daft.set_runner_ray(noop_if_initialized=True)
    frame = daft.from_pydict({"number": list(range(len(tasks))), "task": [pickle.dumps(task) for task in tasks]})
    frame = frame.into_partitions(max(1, min(len(tasks), 4 * workers)))
    result = frame.select(daft.col("number"), do(daft.col("task")).alias("result")).to_pydict()
    yield from ((number, json.loads(text)) for number, text in zip(result["number"], result["result"], strict=True))
