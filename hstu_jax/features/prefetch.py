"""Batches made ahead of their use in a background thread, and on to the device.

Here: the thread, its queue and how errors and ends reach the reader. Not here: what a batch is made
of (`pipeline.py`, which makes them as a function of the step).
"""

import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int

from hstu_jax.features.batch import Batch, BatchShape

_POLL_S = 0.05  # how often a full queue looks whether its reader has stopped


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostBatch:
    """A batch with what the host needs to know about it; never enters a compiled function.

    With several processes it holds the groups that this process makes, and counts these.

    Attributes:
        batch: on the host, or on the device after `iterate(device_put=...)`.
        shape: static sizes of the whole batch.
        window_index: window number in the store of every user slot, -1 where unused.
        step: step of the run (of the evaluation), from 0.
        epoch: epoch of the step, from 0.
        num_users: users in use.
        num_tokens: slots in use, contextual ones included.
        num_queries: positives.
    """

    batch: Batch
    shape: BatchShape
    window_index: Int[np.ndarray, "G U"]
    step: int
    epoch: int
    num_users: int
    num_tokens: int
    num_queries: int


class Prefetcher:
    """Iterator over batches that a background thread makes; use it in a `with` block.

    An exception of the thread is raised by the `next` that would have given its batch. The thread
    ends after the last batch, on `close` or when the iterator is dropped.

    Attributes:
        wait_s: seconds that `next` has waited for a batch, in all.
    """

    def __init__(
        self,
        make_batch: Callable[[int], HostBatch],
        *,
        start_step: int,
        stop_step: int | None,
        num_prefetch: int,
    ):
        self.wait_s = 0.0
        self._queue: queue.Queue = queue.Queue(maxsize=num_prefetch)
        self._stopped = threading.Event()
        # The thread holds the queue and the event, not this object, which can so be dropped.
        self._thread = threading.Thread(
            target=_produce,
            args=(make_batch, start_step, stop_step, self._queue, self._stopped),
            name="hstu-prefetch",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, self._stopped.set)
        self._thread.start()

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        if self._stopped.is_set():
            raise StopIteration
        started = time.perf_counter()
        item = self._queue.get()
        self.wait_s += time.perf_counter() - started
        if isinstance(item, HostBatch):
            return item
        self.close()
        if item is not None:
            raise item
        raise StopIteration

    def close(self) -> None:
        """Stops the thread and waits for it; batches not yet taken are dropped."""
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(
    make_batch: Callable[[int], HostBatch],
    start_step: int,
    stop_step: int | None,
    out: queue.Queue,
    stopped: threading.Event,
) -> None:
    """Body of the prefetch thread; ends with None or the exception that stopped it."""
    step = start_step
    while not stopped.is_set():
        try:
            item = make_batch(step) if stop_step is None or step < stop_step else None
        except BaseException as error:  # noqa: BLE001 - raised again in the reader
            item = error
        while not stopped.is_set():
            try:
                out.put(item, timeout=_POLL_S)
                break
            except queue.Full:
                continue
        if not isinstance(item, HostBatch):
            return
        step += 1
