"""Two things at once."""

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
    """Do ``work`` in a thread of its own. If the caller fails, its event is set."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(work, stop)
        except BaseException:
            stop.set()
            raise


def half_the_cores() -> int:
    """How many threads each of two things that run side by side should have.

    Two that each use all cores wait for threads of their own that the other keeps from running: that costs more than
    running one after the other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)


@contextmanager
def torch_threads() -> Iterator[Callable[[int], None]]:
    """A function that says how many threads torch may use from then on, until the end."""
    import torch

    before = torch.get_num_threads()
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(before)
