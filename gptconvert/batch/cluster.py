"""Run jobs on the workers of a Dask cluster.

Dask queues, limits memory by the workers' resource MEMORY, and starts a job again when its worker dies. The job
itself runs in a process of its own on the worker's machine. Sources and outputs are paths that all machines share, or
URLs.

Only as many jobs as the workers have threads are submitted at a time, because Dask suspects every job of a worker
that dies, even one that has not begun. A job that Dask gives up is run again alone before it is blamed.
"""

from __future__ import annotations

import asyncio
import os
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gptconvert.batch.jobs import Entry, parse_job
from gptconvert.batch.local import Emit, Waiting, finished, waiting_of
from gptconvert.batch.memory import too_large
from gptconvert.batch.process import GRACE, POLL, Process, stop_all
from gptconvert.batch.results import Record, failure
from gptconvert.containers.json import read_json_object
from gptconvert.errors import GptConvertError, OutputError, UnsupportedError, UsageError, install_hint, reason
from gptconvert.version import __version__

#: The resource that workers declare, in bytes: ``dask worker --resources MEMORY=100e9``.
RESOURCE = "MEMORY"
#: Seconds to wait for the scheduler.
CONNECT = 6.0
MAX_SCHEDULER_FILE = 1 << 20
#: Jobs that run in this process, if it is a worker.
_running: set[Process] = set()


def connect(address: str) -> Any:
    """A client of the scheduler at an address, or of the one that a scheduler file describes.

    Raises:
        UnsupportedError: distributed is not installed.
        UsageError: not an address.
        OutputError: the scheduler cannot be reached.
    """
    try:
        import distributed
    except ModuleNotFoundError as error:
        what = f"--dask needs the Python package {error.name}, which is not installed"
        raise UnsupportedError(what, hint=install_hint("cluster")) from None
    what, hint = (
        "the Dask scheduler cannot be reached",
        "check the address, and that the scheduler runs: dask scheduler",
    )
    try:
        where = _address_in(address) if os.path.isfile(address) else address
        asyncio.run(asyncio.wait_for(_require_scheduler(where), CONNECT))
        return distributed.Client(where, timeout=CONNECT, set_as_default=False, name="gptconvert-batch")
    except ValueError as error:
        raise UsageError(f"not an address of a Dask scheduler ({error})", item="--dask", found=address) from error
    except (OSError, TimeoutError) as error:
        why = f" ({reason(error)})" if str(error) else f" within {CONNECT:.0f} seconds"
        raise OutputError(f"{what}{why}", item="--dask", found=address, hint=hint) from error
    except Exception as error:  # the answer of another program, which could mean anything
        why = f"the answer is not that of a Dask scheduler ({type(error).__name__}: {error})"
        raise OutputError(why, item="--dask", found=address, hint=hint) from error


def _address_in(path: str) -> str:
    """The address in a scheduler file."""
    address = read_json_object(path, MAX_SCHEDULER_FILE, "the scheduler file").get("address")
    if not isinstance(address, str):
        raise ValueError(f"{path} has no `address`")
    return address


async def _require_scheduler(address: str) -> None:
    """Check that a scheduler answers. A client that fails to connect takes long to give up."""
    from distributed.core import rpc
    from distributed.security import Security

    async with rpc(address, timeout=CONNECT, connection_args=Security().get_connection_args("client")) as scheduler:
        found = await scheduler.identity()
    if found.get("type") != "Scheduler":
        raise ValueError(f"it is that of a {found.get('type')}")


class ClusterBatch:
    """Jobs on a cluster.

    Args:
        entries: the list; lines that are bad are ignored.
        emit: receives each result, in order of completion.
        client: connected to the scheduler.
        retry: how often a job is started again if it fails for a reason that may pass.
        note: receives notes for the user, one sentence each.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        emit: Emit,
        client: Any,
        *,
        retry: int = 0,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._waiting, self._emit, self._client, self._retry = waiting_of(entries), emit, client, retry
        self._suspects: deque[Waiting] = deque()
        self._flying: dict[Any, Waiting] = {}
        self._done: queue.Queue[Any] = queue.Queue()
        self._run, self._note, self._noted = uuid.uuid4().hex[:12], note, set[str]()

    def run(self) -> None:
        """Run all jobs. If interrupted, stop those that are running and leave what is published.

        Raises:
            OutputError: the connection to the scheduler is lost.
        """
        try:
            while self._waiting or self._flying or self._suspects:
                self._submit()
                self._collect()
        except BaseException:
            self._stop()
            raise

    def _submit(self) -> None:
        """Submit jobs while the workers have threads; suspects one at a time."""
        with _connected():
            threads = sum(self._client.nthreads().values())
            limit, declared = self._limit()
        if not threads:
            self._note_once("the cluster has no workers yet; the first job waits for one")
        elif not declared:
            text = (
                f"the workers declare no {RESOURCE}, so memory is not limited: dask worker --resources MEMORY=100e9"
            )
            self._note_once(text)
        while self._waiting and len(self._flying) < max(1, threads):
            each = self._waiting.popleft()
            if declared and each.need > limit:
                self._finish(each, failure(too_large(each.need, limit, "any worker declares")))
            else:
                self._send(each, declared)
        if self._suspects and not self._flying and not self._waiting:
            self._send(self._suspects.popleft(), declared)

    def _note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._note(text)

    def _limit(self) -> tuple[int, bool]:
        """The most memory that a worker declares, and whether any does."""
        workers = self._client.scheduler_info()["workers"].values()
        found = [each["resources"][RESOURCE] for each in workers if RESOURCE in each.get("resources", {})]
        return int(max(found, default=0)), bool(found)

    def _send(self, each: Waiting, declared: bool) -> None:
        each.attempts += 1
        with _connected():
            future = self._client.submit(
                run_on_worker,
                each.job.as_dict(),
                __version__,
                key=f"gptconvert-{self._run}-{each.entry.line}-{each.attempts}",
                resources={RESOURCE: each.need} if declared else None,
                pure=False,
            )
        self._flying[future] = each
        future.add_done_callback(self._done.put)

    def _collect(self) -> None:
        """Wait for the next result, for at most a second."""
        if not self._flying:
            return
        try:
            future = self._done.get(timeout=1.0)
        except queue.Empty:
            self._require_connection()
            return
        if future.status in ("cancelled", "lost"):
            raise _lost()
        each = self._flying.pop(future)
        record = self._record(future)
        if record is None:
            self._suspects.append(each)
        elif record.is_transient and each.attempts <= self._retry:
            self._waiting.append(each)
        else:
            self._finish(each, record)

    def _record(self, future: Any) -> Record | None:
        """The result of a job; None if it may have died through the fault of another."""
        from distributed import KilledWorker

        error = future.exception() if future.status == "error" else None
        if error is None:
            return Record(**future.result())
        if not isinstance(error, KilledWorker):
            what = f"the worker could not run the job ({type(error).__name__}: {error})"
            return failure(GptConvertError(what, hint="install the same version of gptconvert on all workers"), 1)
        if self._flying:
            return None
        hint = 'memory may have run out: give the job a larger "memory"; the worker\'s log has more'
        return failure(GptConvertError("KilledWorker: each worker that ran the job died", hint=hint), 137)

    def _finish(self, each: Waiting, record: Record) -> None:
        self._emit(finished(each, record))

    def _require_connection(self) -> None:
        if self._client.status != "running":
            raise _lost()

    def _stop(self) -> None:
        """Cancel what has not finished, and wait until the workers have stopped it."""
        try:
            self._client.cancel([*self._flying])
            end = time.monotonic() + GRACE
            while time.monotonic() < end and any(self._client.run(count_running).values()):
                time.sleep(POLL)
        except Exception:  # the connection may be what failed
            return


@contextmanager
def _connected() -> Iterator[None]:
    """Convert the errors of a lost connection."""
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError

    try:
        yield
    except (CommClosedError, FutureCancelledError, OSError) as error:
        raise _lost() from error


def _lost() -> OutputError:
    hint = "finished jobs are published; run the batch again, and only the others run"
    return OutputError("the connection to the Dask scheduler is lost", item="--dask", hint=hint)


def count_running() -> int:
    """How many jobs run in this worker."""
    return len(_running)


def run_on_worker(job: Mapping[str, object], version: str) -> dict[str, Any]:
    """Run a job in a process on this worker; stop it if Dask cancels the task. Returns the fields of a ``Record``."""
    from distributed import get_worker

    worker = get_worker()
    if version != __version__:
        what = "the worker has another version of gptconvert"
        error = UnsupportedError(what, path=worker.address, expected=version, found=__version__)
        return _fields(failure(error), worker.address)
    # All jobs of a worker share its cores.
    threads = max(1, (os.cpu_count() or 1) // max(1, worker.state.nthreads))
    process = Process(parse_job(dict(job)), {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))})
    _running.add(process)
    try:
        while (record := process.poll()) is None:
            if _is_cancelled(worker):
                stop_all([process])
                return _fields(failure(GptConvertError("cancelled"), 143), worker.address)
            time.sleep(POLL)
    finally:
        _running.discard(process)
    return _fields(record, worker.address)


def _is_cancelled(worker: Any) -> bool:
    """Whether Dask no longer wants the result of the task that this thread runs."""
    task = worker.state.tasks.get(worker.get_current_task())
    return task is None or task.state == "cancelled"


def _fields(record: Record, worker: str) -> dict[str, Any]:
    return {
        "status": record.status,
        "exit_code": record.exit_code,
        "error": record.error,
        "seconds": record.seconds,
        "worker": worker,
        "details": dict(record.details),
    }
