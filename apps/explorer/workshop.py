"""The workshop: one copy of each model for all sessions, one piece of work at a time on it, results remembered.

Hooks are on a model while work runs, so each model has one worker thread. Work is told apart by its call: two sessions
that ask for the same thing share it, and two that ask for different things cannot get each other's.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from interp.apps.explorer.calls import Call, call, carry_out
from interp.hooks.model import Model
from interp.hooks.watching import watched

BUDGET = 2 << 30
_SCOPE = 512 << 20  # What a LinearScope is counted as: it keeps the graph of its reference.


class Cancelled(Exception):
    """Nobody waits for the work any more."""


class Job:
    """One piece of work.

    Attributes:
        call: What is computed.
        step: What is being done.
        passes: Forward calls of models so far.
    """

    def __init__(self, call: Call):
        self.call, self.step, self.passes, self.started = call, "", 0, 0.0
        self.interested: set[str] = set()
        self.future: Future[Any]
        self._stop = threading.Event()

    @property
    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self.future.done()

    @property
    def running(self) -> bool:
        """Whether it has begun."""
        return self.started > 0

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.started if self.started else 0.0

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most so long; return whether it came."""
        try:
            self.future.exception(timeout=seconds)
        except TimeoutError:
            return False
        return True

    def leave(self, session: str) -> None:
        """A session no longer wants it; when none does, it ends at the next module that is called."""
        self.interested.discard(session)
        if not self.interested:
            self.stop()

    def stop(self) -> None:
        """End it at the next module that is called, whoever waits."""
        self._stop.set()

    def check(self) -> None:
        """End the work where nobody waits.

        Raises:
            Cancelled: If nobody does.
        """
        if self._stop.is_set():
            raise Cancelled

    @property
    def abandoned(self) -> bool:
        """Whether it was told to end."""
        return self._stop.is_set()


class Workshop:
    """Models, their workers, and results by call."""

    def __init__(self, budget: int = BUDGET):
        self._lock = threading.RLock()
        self._workers: dict[str, ThreadPoolExecutor] = {}
        self._jobs: dict[str, Job] = {}
        self._models: dict[str, Model] = {}
        self._kept: collections.OrderedDict[str, tuple[Any, int]] = collections.OrderedDict()
        self._budget = budget

    def load(self, name: str) -> None:
        """Load a model now, in the calling thread.

        Raises:
            InterpError: If it cannot be loaded.
        """
        wanted = call("model", "interp.load", name)
        self.keep(wanted.key, carry_out(wanted, lambda _, compute: compute()))

    def ask(self, wanted: Call, session: str) -> Job:
        """Begin a piece of work, or join one that is under way."""
        with self._lock:
            job = self._jobs.get(wanted.key)
            if job is None or job.abandoned or job.done:
                job = self._jobs[wanted.key] = Job(wanted)
                job.interested.add(session)
                job.future = self._worker(wanted).submit(self._work, job)
            job.interested.add(session)
            return job

    def has(self, call: Call) -> bool:
        """Whether the result is remembered."""
        with self._lock:
            return call.key in self._kept or call.key in self._models

    def get(self, call: Call) -> Any:
        """The remembered result of a call."""
        with self._lock:
            if call.key in self._models:
                return self._models[call.key]
            self._kept.move_to_end(call.key)
            return self._kept[call.key][0]

    def keep(self, key: str, result: Any) -> None:
        """Remember a result; the ones that were not asked for longest are forgotten beyond the budget."""
        with self._lock:
            if isinstance(result, Model):
                self._models[key] = result
                return
            self._kept[key] = (result, size_of(result))
            while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self._budget:
                self._kept.popitem(last=False)

    def close(self) -> None:
        """End all work at the next module that it calls, and begin none any more."""
        with self._lock:
            for job in self._jobs.values():
                job.stop()
            for worker in self._workers.values():
                worker.shutdown(wait=False, cancel_futures=True)

    def _worker(self, call: Call) -> ThreadPoolExecutor:
        models = [c for c in call.needed() if c.target == "interp.load"]
        name = models[0].key if models else ""
        if name not in self._workers:
            self._workers[name] = ThreadPoolExecutor(1, thread_name_prefix=f"explorer-{name}")
        return self._workers[name]

    def _work(self, job: Job) -> Any:
        job.started = time.monotonic()
        roots: set[int] = {id(m.module) for m in self._models.values()}

        def each(module: Any) -> None:
            job.passes += id(module) in roots
            job.check()

        def remember(call: Call, compute: Callable[[], Any]) -> Any:
            job.check()
            if self.has(call):
                return self.get(call)
            job.step = call.name
            result = compute()
            if isinstance(result, Model):
                roots.add(id(result.module))
            self.keep(call.key, result)
            return result

        try:
            with watched(each):
                return carry_out(job.call, remember)
        finally:
            with self._lock:
                if self._jobs.get(job.call.key) is job:
                    del self._jobs[job.call.key]


def size_of(result: Any) -> int:
    """About how many bytes a result keeps."""
    if isinstance(result, Tensor):
        return result.numel() * result.element_size()
    if type(result).__name__ == "LinearScope":
        return _SCOPE
    if dataclasses.is_dataclass(result):
        return sum(size_of(getattr(result, f.name)) for f in dataclasses.fields(result))
    if isinstance(result, dict):
        return sum(map(size_of, result.values()))
    if isinstance(result, (list, tuple)) and result:
        return len(result) * max(size_of(result[0]), 64)
    return 256
