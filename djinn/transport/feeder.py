"""Hands copies to the reader's threads, in a way that an interrupt of the thread that asks for them cannot upset.

Ctrl-C comes to the main thread between any two steps of Python, and the locks of an executor and its futures take
several: one that stays locked would stop every thread for good. So who streams only puts requests into a queue and
waits on bare locks, each a single step, and a thread of its own, which no signal comes to, talks to the executor.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait

from djinn.transport.reader import Reader

Move = Callable[[], float]
"""Copies one piece; returns when that ended."""


class Fill:
    """The copy of one unit under way."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()
        self._closed = threading.Lock()
        self._closed.acquire()
        self._counting = threading.Lock()
        self._pieces_left = 0
        self._end_s = 0.0
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether every piece has ended."""
        return not self._closed.locked()

    def settle(self) -> None:
        """Block until every piece has ended, well or badly."""
        with self._closed:
            pass

    def wait(self) -> float:
        """Block until every piece has ended; return when the last one did, or raise the first error, once."""
        self.settle()
        # Its traceback will hold the pass that it ends, and so the model, which this copy must not keep alive.
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._end_s

    def end(self, error: BaseException | None = None) -> None:
        """Let those who wait go on."""
        self._error = error
        self._end_s = time.perf_counter()
        self._closed.release()

    def follow(self, pieces: list[Future[float]]) -> None:
        """End when all pieces have ended, with the error of the first that has one."""
        self._pieces_left = len(pieces)

        def count(_: Future[float]) -> None:
            with self._counting:
                self._pieces_left -= 1
                last = self._pieces_left == 0
            if last:
                self.end(next((error for piece in pieces if (error := piece.exception()) is not None), None))

        for piece in pieces:
            piece.add_done_callback(count)


class Feeder:
    """Gives copies to a reader's threads, in the order in which it is asked to."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._requests: queue.SimpleQueue[tuple[Fill, Iterable[Move] | None] | None] = queue.SimpleQueue()
        self._given: set[Future[float]] = set()
        self._thread = threading.Thread(target=self._run, name="djinn-reader-feeder", daemon=True)
        self._thread.start()

    def begin(self, fill: Fill, moves: Iterable[Move]) -> None:
        """Start the copy that ``moves``, at least one, are the pieces of."""
        self._requests.put((fill, moves))

    def settle(self) -> None:
        """Block until every copy that was ever begun has ended, whether or not its fill is still known."""
        all_before = Fill()
        self._requests.put((all_before, None))
        all_before.settle()

    def close(self) -> None:
        """Let copies under way end, and the thread."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            fill, moves = request
            if moves is None:
                wait(set(self._given))
                fill.end()
                continue
            self._give(fill, moves)
        wait(set(self._given))

    def _give(self, fill: Fill, moves: Iterable[Move]) -> None:
        pieces: list[Future[float]] = []
        try:
            for move in moves:
                pieces.append(self._reader.pool.submit(move))
                self._given.add(pieces[-1])
        except RuntimeError as error:  # the interpreter ends
            wait(pieces)  # what has been given goes on, and the ring must not start anew before it has ended
            fill.end(error)
        else:
            fill.follow(pieces)
        for piece in pieces:
            piece.add_done_callback(self._given.discard)
