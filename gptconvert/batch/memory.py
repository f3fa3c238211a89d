"""How much memory a job needs, and how much there is.

The need is an upper bound of the measurements in docs/performance.md: memory that must be present, without mapped
pages, which the kernel drops at any time. It is computed from the size of the source without opening it, because a
damaged file must not harm the process that runs the batch.
"""

from __future__ import annotations

import os
from contextlib import suppress

from gptconvert.batch.jobs import Job, is_url
from gptconvert.errors import GptConvertError, OutputError

MIB, GIB = 1 << 20, 1 << 30
#: Writing, whatever the size of the model: Python, its libraries and a few blocks.
WRITING = 192 * MIB
#: Writing and verifying a SavedModel: TensorFlow.
TENSORFLOW = 768 * MIB
#: Verifying: PyTorch and onnxruntime; twice the weights of a small model; of a large one, its largest tensors.
VERIFYING, COPIES, MOST_COPIED, SHARE = 512 * MIB, 2.2, 1280 * MIB, 1 / 20
#: Verifying quantised graphs: the weights that onnxruntime packs.
MOST_PACKED = 512 * MIB
#: Share of the free memory that jobs may use together.
USABLE = 0.9


def needed(job: Job) -> int:
    """Bytes of memory that a job needs: its own figure, or an estimate."""
    return estimate(job, source_size(job)) if job.memory is None else job.memory


def estimate(job: Job, size: int) -> int:
    """Bytes of memory that a job whose source has ``size`` bytes needs, at most."""
    need = float(WRITING)
    if "tf" in job.options.targets:
        need += TENSORFLOW
    if job.options.verify is not None:
        need += VERIFYING + min(COPIES * size, MOST_COPIED) + SHARE * size
        need += min(size, MOST_PACKED) * bool(job.options.quantize)
    return int(need)


def source_size(job: Job) -> int:
    """Bytes of the files of a job's source; 0 if unknown, as for hub repositories."""
    if is_url(job.source):
        from gptconvert.batch.remote import size_of

        with suppress(GptConvertError):
            return size_of(job.source)
        return 0
    return sum(_file_size(path) for path in _files(job.source))


def _files(source: str) -> list[str]:
    """The files of a local source: in the directory, or with the prefix."""
    if os.path.isdir(source):
        return [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
    folder, prefix = os.path.split(source)
    with suppress(OSError):
        return [os.path.join(folder, name) for name in os.listdir(folder) if name.startswith(prefix)]
    return []


def _file_size(path: str) -> int:
    with suppress(OSError):
        return os.path.getsize(path)
    return 0


def available() -> int:
    """Bytes of memory that jobs on this machine may use together: what is free, within the cgroup's limit."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        free.append(next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):
        free.append(_read_number("memory.max") - _read_number("memory.current") + _reclaimable())
    return int(USABLE * max(0, min(free)))


def _read_number(name: str) -> int:
    """A number in the cgroup's directory; ValueError for ``max``, which means no limit."""
    with open(f"/sys/fs/cgroup/{name}", encoding="ascii") as file:
        return int(file.read())


def _reclaimable() -> int:
    """Bytes of files that the cgroup caches."""
    with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file:
        fields = dict(line.split() for line in file)
    return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))


def too_large(need: int, limit: int, whose: str) -> OutputError:
    """The error of a job that can never fit."""
    return OutputError(
        f"the job needs more memory than {whose}",
        expected=f"at most {limit / GIB:.2f} GiB",
        found=f"{need / GIB:.2f} GiB",
        hint='use a machine with more memory; if the job needs less, state it: "memory": "2GiB"',
    )
