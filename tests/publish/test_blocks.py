"""Blocks and their worker threads: bytes and sources, reuse of buffers, and cancellation."""

from __future__ import annotations

import hashlib
import threading

import pytest

from gptconvert.model.tensors import Segment
from gptconvert.publish.blocks import Block, BlockPool, Worker
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.source_reader import StoppedError


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def pool(stop: threading.Event) -> BlockPool:
    return BlockPool(stop, IoSettings(block_bytes=10, block_count=2))


@pytest.fixture
def block(pool: BlockPool) -> Block:
    return pool.acquire(30)


class TestBlock:
    def test_takes_as_much_as_fits(self, block: Block) -> None:
        assert block.append(memoryview(b"1234567")) == 7
        assert not block.full
        assert block.append(memoryview(b"89abcdef")) == 3
        assert block.full
        assert (block.offset, bytes(block.data)) == (30, b"123456789a")

    def test_padding_is_zero_in_a_reused_buffer(self, pool: BlockPool, block: Block) -> None:
        block.append(memoryview(b"x" * 10))
        other = pool.acquire(0)
        block.share(1)
        block.release()
        again = pool.acquire(0)
        again.append(memoryview(b"12345"))
        assert bytes(again.padded(4)) == b"12345\0\0\0"
        assert bytes(again.data) == b"12345"
        assert other.used == 0

    def test_contiguous_copies_become_one(self, block: Block) -> None:
        block.append(memoryview(b"12"), Segment("s", 100, 2))
        block.append(memoryview(b"34"), Segment("s", 102, 2))
        block.append(memoryview(b"5"))
        block.append(memoryview(b"6"), Segment("s", 104, 1))
        block.append(memoryview(b"78"), Segment("t", 105, 2))
        block.append(memoryview(b"9abcd"), Segment("t", 109, 5))  # only two bytes fit
        assert block.copies == [
            (0, Segment("s", 100, 4)),
            (5, Segment("s", 104, 1)),
            (6, Segment("t", 105, 2)),
            (8, Segment("t", 109, 2)),
        ]

    def test_records_the_bytes_of_each_digest(self, block: Block) -> None:
        first, second = hashlib.sha256(), hashlib.sha256()
        block.append(memoryview(b"12"), digests=[first])
        block.append(memoryview(b"345"), digests=[first, second])
        assert block.digests == [(0, 2, first), (2, 5, first), (2, 5, second)]


class TestBlockPool:
    def test_last_release_returns_the_buffer(self, pool: BlockPool, block: Block, stop: threading.Event) -> None:
        pool.acquire(0)
        block.share(2)
        block.release()
        threading.Timer(0.05, stop.set).start()
        with pytest.raises(StoppedError):
            pool.acquire(0)
        block.release()
        stop.clear()
        assert pool.acquire(7).offset == 7


class TestWorker:
    def test_runs_in_order_and_skips_the_rest_after_a_failure(self, stop: threading.Event) -> None:
        ran: list[int] = []
        worker = Worker(stop)
        error = ValueError("broken")

        def fail() -> None:
            raise error

        for task in (lambda: ran.append(1), lambda: ran.append(2), fail, lambda: ran.append(3)):
            worker.submit(task)
        worker.close()
        assert ran == [1, 2]
        assert worker.error is error
        assert stop.is_set()

    def test_releases_the_blocks_of_skipped_tasks(self, pool: BlockPool, stop: threading.Event) -> None:
        blocks = [pool.acquire(0), pool.acquire(10)]
        worker = Worker(stop)
        stop.set()
        for block in blocks:
            block.share(1)
            worker.submit(lambda: pytest.fail("cancelled"), block)
        worker.close()
        stop.clear()
        guard = threading.Timer(5, stop.set)  # an unreleased block must fail the test, not hang it
        guard.start()
        assert [pool.acquire(0).used, pool.acquire(0).used] == [0, 0]
        guard.cancel()
