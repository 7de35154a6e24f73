"""A stand-in for what transfers use of CuPy: streams that do their work late.

What is queued on a stream is done when somebody waits for it; or, as the other extreme, streams
other than the current one do it as soon as they may. Memory of the device and page-locked memory
go back to pools and are handed out again at once, so that a copy which is not ordered as it must
be reads or writes what belongs to another.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np


class Pool:
    """Blocks by size; the last one given back is the first to be used again."""

    def __init__(self):
        self.free: dict[int, list[np.ndarray]] = defaultdict(list)
        self.all: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        if not self.free[size]:
            self.all.append(np.full(size, 255, dtype=np.uint8))
            self.free[size].append(self.all[-1])
        return self.free[size].pop()


class Memory:
    """A block of a pool, for as long as this object lives."""

    def __init__(self, pool: Pool, shape: tuple[int, ...], dtype: Any):
        self.pool, self.block = pool, pool.take(math.prod(shape) * np.dtype(dtype).itemsize)
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (self.block.ctypes.data, False),
        }

    def __del__(self):
        self.pool.free[self.block.size].append(self.block)


def address(a: np.ndarray) -> np.ndarray:
    """The memory of an array by its address alone, as a copy engine has it."""
    memory = (ctypes.c_ubyte * a.nbytes).from_address(a.ctypes.data)
    return np.frombuffer(memory, dtype=a.dtype).reshape(a.shape)


class Machine:
    """One device; `module` and `extra` take the places of cupy and cupyx."""

    def __init__(self, eager: bool):  # noqa: C901 (small classes that share it)
        machine, device_pool, locked_pool = self, Pool(), Pool()
        self.locked = locked_pool

        class Stream:
            def __init__(self, non_blocking: bool):
                assert non_blocking  # or it would wait for the default stream
                machine.streams.append(self)
                self.queue: list[Callable[[], None]] = []
                self.finished = 0

            def put(self, work: Callable[[], None]):
                self.queue.append(work)
                if eager and self is not machine.current:
                    self.synchronize()

            def wait_event(self, event: Event):
                stream, place = event.stream, event.place
                self.put(lambda: stream.run(place))

            def run(self, place: int):
                while self.finished < place:
                    self.queue[self.finished]()
                    self.finished += 1

            def synchronize(self):
                self.run(len(self.queue))

        class Event:
            def __init__(self, disable_timing: bool):
                self.stream, self.place = None, 0

            def record(self, stream: Stream | None = None):
                self.stream = stream or machine.current
                self.place = len(self.stream.queue)

            @property
            def done(self) -> bool:
                return self.stream.finished >= self.place

            def synchronize(self):
                self.stream.run(self.place)

        class Array:
            device = nullcontext()

            def __init__(self, shape: tuple[int, ...], dtype: Any):
                self.shape, self.dtype = shape, np.dtype(dtype)
                self.values = np.asarray(Memory(device_pool, shape, dtype))

            def get(self, out: np.ndarray, blocking: bool):
                assert not blocking
                source, goal = address(self.values), address(out)
                machine.current.put(lambda: np.copyto(goal, source))

            def set(self, host: np.ndarray, stream: Stream):
                assert (host.shape, host.dtype) == (self.shape, self.dtype)
                source, goal = address(host), address(self.values)
                stream.put(lambda: np.copyto(goal, source))

        self.streams: list[Stream] = []
        self.current = Stream(non_blocking=True)
        self.module, self.extra = ModuleType("cupy"), ModuleType("cupyx")
        self.module.ndarray, self.module.empty = Array, Array
        self.module.cuda = ModuleType("cupy.cuda")
        self.module.cuda.Stream, self.module.cuda.Event = Stream, Event
        self.module.cuda.get_current_stream = lambda: self.current
        self.extra.empty_pinned = lambda shape, dtype: np.asarray(Memory(locked_pool, shape, dtype))

    def finish(self):
        """Do all work, that of the current stream first."""
        for stream in self.streams:
            stream.synchronize()

    def launch(self, kernel: Callable[..., None], *arrays: Any):
        """Queue work on the current stream, which has the arrays by their addresses."""
        values = [address(a.values) for a in arrays]
        self.current.put(lambda: kernel(*values))

    def array(self, values: np.ndarray) -> Any:
        """An array of the device, filled by a kernel."""
        a = self.module.empty(values.shape, values.dtype)
        self.launch(lambda v: np.copyto(v, values), a)
        return a
