"""One job in a process of its own: a damaged file, a crash or the out-of-memory killer ends that job only.

The process is ``gptconvert batch - --alone --json``. It reads the job from its standard input and ends when that is
closed, so that it stops when the process that started it dies, however it dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from gptconvert.batch.jobs import Job
from gptconvert.batch.results import DETAILS, Record, failure
from gptconvert.errors import GptConvertError
from gptconvert.publish import signals

COMMAND = (sys.executable, "-m", "gptconvert", "batch", "-", "--alone", "--json")
#: Seconds that a process may take to clean up once it is stopped; then it is killed.
GRACE = 12.0
#: Seconds for which a job waits for a lock: that of a process that is cleaning up after it was stopped.
PATIENCE = 20.0
#: Pause between polls of running processes, in seconds.
POLL = 0.05
_LOCKED = "locked by pid"
_TAIL = 1000


class Process:
    """A job that is running. It is started again while its output is locked, for at most :data:`PATIENCE`.

    Args:
        job: the job.
        environment: variables to set.
    """

    def __init__(self, job: Job, environment: Mapping[str, str] | None = None) -> None:
        self._job, self._begun = job, time.monotonic()
        # The options of a job are those in the list.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GPTCONVERT_")}
        self._environment = {**inherited, **(environment or {})}
        self._stopped = False
        self._start()

    def _start(self) -> None:
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (until it ends)
        self._popen = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=self._err,
            env=self._environment,
            start_new_session=True,  # a Ctrl-C in the terminal reaches it through this process only
        )
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):
            self._popen.stdin.write(json.dumps(self._job.as_dict()).encode() + b"\n")
            self._popen.stdin.flush()

    def poll(self) -> Record | None:
        """The result; None while the job is running."""
        if self._popen.poll() is None:
            return None
        record = self._record(self._popen.returncode)
        self._close()
        waits = not self._stopped and time.monotonic() - self._begun < PATIENCE
        if waits and record.error is not None and str(record.error["message"]).startswith(_LOCKED):
            time.sleep(10 * POLL)
            self._start()
            return None
        return record

    def stop(self) -> None:
        """Ask the process to stop; it publishes nothing unless it has already done so."""
        self._stopped = True
        with suppress(OSError):
            if self._popen.stdin is not None:
                self._popen.stdin.close()

    def kill(self) -> None:
        """End the process and those that it started."""
        self._stopped = True
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def _close(self) -> None:
        for stream in (self._out, self._err, self._popen.stdin):
            with suppress(OSError):
                if stream is not None:
                    stream.close()

    def _record(self, code: int) -> Record:
        seconds = time.monotonic() - self._begun
        code = 128 - code if code < 0 else code
        try:
            value = json.loads(_read(self._out))
            error, ok = value.get("error"), value["ok"]
        except (ValueError, KeyError, AttributeError):
            return failure(self._died(code), code or 1, seconds=seconds)
        if not ok:
            error = {**GptConvertError("the job failed").as_dict(), **(error or {}), "exit_code": code}
            return Record("failed", exit_code=code, error=error, seconds=seconds)
        details = {name: value[name] for name in DETAILS if name in value}
        return Record(value["status"], seconds=seconds, details=details)

    def _died(self, code: int) -> GptConvertError:
        """The error of a process that reported nothing."""
        number = code - 128
        if number in set(signal.Signals):
            hint = "memory may have run out" if number == signal.SIGKILL else None
            return GptConvertError(f"the process was killed by {signal.Signals(number).name}", hint=hint)
        said = _read(self._err)[-_TAIL:].decode("utf-8", "replace").strip()
        return GptConvertError(f"the process reported no result (exit code {code}): {said}")


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def stop_all(processes: Sequence[Process]) -> dict[Process, Record]:
    """Stop processes, and wait for them to clean up; returns the results of those that had published."""
    found: dict[Process, Record] = {}
    for process in processes:
        process.stop()
    end, waiting = time.monotonic() + GRACE, list(processes)
    while waiting and time.monotonic() < end:
        for process in list(waiting):
            record = process.poll()
            if record is not None:
                found[process] = record
                waiting.remove(process)
        time.sleep(POLL)
    for process in waiting:
        process.kill()
    return {process: record for process, record in found.items() if record.exit_code == 0}


def read_job_line() -> Any:
    """The job on standard input. From now on, this process stops when standard input is closed."""
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(0, 1 << 16)
        if not data:
            break
        line += data
    threading.Thread(target=_stop_at_end, name="end of input", daemon=True).start()
    return json.loads(line)


def _stop_at_end() -> None:
    """Interrupt this process at the end of its input, as a signal does; end it if it does not react."""
    with suppress(OSError):
        while os.read(0, 1 << 16):
            pass
    os.kill(os.getpid(), signals.SIGNALS[1])
    time.sleep(GRACE - 2)
    os._exit(128 + signals.SIGNALS[1])
