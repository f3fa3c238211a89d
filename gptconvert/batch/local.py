"""Run jobs on this machine: a few at a time, and only as many as fit into memory."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from gptconvert.batch.jobs import Entry, Job
from gptconvert.batch.memory import needed, too_large
from gptconvert.batch.process import POLL, Process, stop_all
from gptconvert.batch.results import Record, failure

Emit = Callable[[Record], None]


@dataclass
class Waiting:
    """A job that is not running.

    Attributes:
        entry: its line.
        job: the job.
        attempts: how often it was started.
    """

    entry: Entry
    job: Job
    attempts: int = 0
    _need: int | None = field(default=None, repr=False)

    @property
    def need(self) -> int:
        """Bytes of memory; computed on first use, since sources may be remote."""
        if self._need is None:
            self._need = needed(self.job)
        return self._need


def waiting_of(entries: Iterable[Entry]) -> deque[Waiting]:
    """The jobs of entries that are good."""
    return deque(Waiting(entry, entry.job) for entry in entries if entry.job is not None)


class LocalBatch:
    """Jobs on this machine.

    Args:
        entries: the list; lines that are bad are ignored.
        emit: receives each result, in order of completion.
        jobs: how many may run at a time.
        memory: bytes that they may use together.
        retry: how often a job is started again if it fails for a reason that may pass.
    """

    def __init__(self, entries: Iterable[Entry], emit: Emit, *, jobs: int, memory: int, retry: int = 0) -> None:
        self._waiting, self._emit = waiting_of(entries), emit
        self._jobs, self._memory, self._retry = jobs, memory, retry
        self._running: dict[Process, Waiting] = {}

    def run(self) -> None:
        """Run all jobs. If interrupted, stop those that are running and leave what is published."""
        try:
            while self._waiting or self._running:
                self._start_fitting()
                self._collect()
                if self._running:
                    time.sleep(POLL)
        finally:
            for process, record in stop_all([*self._running]).items():
                self._finish(self._running.pop(process), record)

    def _start_fitting(self) -> None:
        """Start the first jobs that fit beside those that are running; report those that can never fit."""
        free = self._memory - sum(each.need for each in self._running.values())
        for each in list(self._waiting):
            if len(self._running) >= self._jobs:
                return
            if each.need > self._memory:
                self._waiting.remove(each)
                self._finish(each, failure(too_large(each.need, self._memory, "the batch may use")))
            elif each.need <= free:
                self._waiting.remove(each)
                free -= each.need
                each.attempts += 1
                self._running[Process(each.job, self._environment())] = each

    def _environment(self) -> Mapping[str, str]:
        """Share the processor's cores among the jobs, unless the user has."""
        if self._jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self._jobs))}

    def _collect(self) -> None:
        for process in list(self._running):
            record = process.poll()
            if record is None:
                continue
            each = self._running.pop(process)
            if record.is_transient and each.attempts <= self._retry:
                self._waiting.append(each)
            else:
                self._finish(each, record)

    def _finish(self, each: Waiting, record: Record) -> None:
        self._emit(finished(each, record))


def finished(each: Waiting, record: Record) -> Record:
    """A result with the line and the attempts of its job."""
    return replace(record.of(each.entry), attempts=each.attempts)
