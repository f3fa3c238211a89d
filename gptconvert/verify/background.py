"""Background work, and how many threads it may use."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def in_background(work: Callable[[threading.Event], T]) -> Iterator[Future[T]]:
    """Run ``work`` in a background thread; if the caller fails, set the event passed to ``work``."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(work, stop)
        except BaseException:
            stop.set()
            raise


def half_the_cores() -> int:
    """How many threads each of two concurrent tasks should use.

    If both use all cores, each waits for threads that the other keeps from running, which costs more than running the
    tasks in turn.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)


@contextmanager
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Yield a function that sets torch's number of threads; restore the number on exit."""
    import torch

    before = torch.get_num_threads()
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Sums in one thread do not depend on the number of cores."""
    with torch_threads() as use:
        use(1)
        yield
