"""Runs the device for many requests at once: one thread owns the device, and other threads hand it work.

Explanations of all requests are written in the same tables, a few tokens in a round. Between two rounds the thread does
all other work: it reads texts, scores descriptions and continues completions. Each request has its own queue of rows,
and the queues take turns, so that a long text does not keep a single token waiting.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from nlae_jax.roles.protocol import CLOSING, OPENING
from nlae_jax.runtime.errors import UserError, first_line
from nlae_jax.serve.jobs import Completion, Job, State, description_of
from nlae_jax.serve.reading import Reader
from nlae_jax.serve.tables import CAPACITIES, Entry, Table, room_for

_ROUND_SECONDS = 0.25  # the intended time of a round of decoding: words should appear as if somebody wrote them
_STOP_SECONDS = 10  # a round, or loading, has this time to end when the engine is stopped
_QUIET_SECONDS = 2.0  # after this time without work the device compiles sizes that were not needed yet
_MOST_TOKENS = 16  # of a round
_SCORED_AT_ONCE = 16
_CACHED = 20_000  # explanations in the cache

log = logging.getLogger("nlae_jax")


class Engine:
    """Owns the device. `load` makes the `Reader` in the engine's thread, which then sets `reader`.

    With `warm` it also compiles the sizes that requests will need, before `on_ready` is called and when idle.
    """

    def __init__(self, load: Callable[[], Reader], warm: bool = True) -> None:
        self.reader: Reader | None = None
        self.failure: BaseException | None = None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None
        self._load, self._warm = load, warm
        self._wake = threading.Condition()
        self._calls: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._queues: collections.deque[collections.deque[Job]] = collections.deque()
        self._completions: list[Completion] = []
        self._unscored: collections.deque[Job] = collections.deque()
        self._tables: dict[int, Table] = {}
        self._pace: dict[Any, float] = {}
        self._known: collections.OrderedDict[bytes, State] = collections.OrderedDict()
        self._flying: dict[bytes, Job] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stops after the round under way. No watcher is called after that."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        self._thread.join(timeout=_STOP_SECONDS)

    # Called by other threads.

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Runs `function` in the device's thread, before the next round, and returns its future."""
        future: Future[Any] = Future()
        with self._wake:
            self._calls.append((function, future))
            self._wake.notify_all()
        return future

    def explain(
        self,
        vectors: Sequence[np.ndarray],
        keys: Sequence[bytes | None],
        limit: int,
        temperature: float,
        seeds: Sequence[int],
        watch: Callable[[int, State], None],
    ) -> Callable[[], None]:
        """Begins to explain a request's vectors. Returns a function that cancels those that no other request watches.

        `watch(number, state)` is called from the device's thread, or at once for explanations in the cache.
        Explanations with the same `key` (not None), limit and temperature are equal: they are written once and cached.
        """
        queue: collections.deque[Job] = collections.deque()
        joined: list[tuple[Job, Callable[[State], None]]] = []
        cached: list[tuple[int, State]] = []
        with self._wake:
            for number, (vector, key, seed) in enumerate(zip(vectors, keys, seeds, strict=True)):
                cache_key = None if key is None else hashlib.sha256(b"%d %r " % (limit, temperature) + key).digest()
                if cache_key is not None and (cached_state := self._known.get(cache_key)) is not None:
                    self._known.move_to_end(cache_key)
                    cached.append((number, cached_state))
                    continue
                watcher = lambda state, number=number: watch(number, state)  # noqa: E731
                job = self._flying.get(cache_key) if cache_key is not None else None
                if job is None:
                    job = Job(np.asarray(vector, np.float32), limit, temperature, seed, cache_key, [])
                    queue.append(job)
                    if cache_key is not None:
                        self._flying[cache_key] = job
                job.watchers.append(watcher)
                joined.append((job, watcher))
            if queue:
                self._queues.append(queue)
                self._wake.notify_all()
        for number, state in cached:
            watch(number, state)

        def cancel() -> None:
            with self._wake:
                for job, watcher in joined:
                    if watcher in job.watchers:
                        job.watchers.remove(watcher)

        return cancel

    def complete(self, completion: Completion) -> None:
        """Begins a completion. It ends early once its `cancelled` is set."""
        with self._wake:
            self._completions.append(completion)
            self._wake.notify_all()

    # Run in the device's thread.

    def _run(self) -> None:
        try:
            reader = self._load()
            if self._warm:
                reader.warm()
            self.reader = reader
        except BaseException as error:  # also SystemExit of a library: only the main thread may end the process
            self.failure = error
            self.on_failure()
            return
        self.on_ready()
        more = reader.warm_more() if self._warm else iter(())
        while self._wait(more):
            self._do_calls()
            for step in (self._write, self._score, self._continue_completions):
                try:
                    step()
                except Exception as error:
                    log.exception("the device's work failed")
                    self._give_up_all(error)

    def _wait(self, idle: Iterator[None]) -> bool:
        """Waits until there is work, and returns False when it is time to stop. Runs the steps of `idle` meanwhile."""
        has_work = lambda: (  # noqa: E731
            self._calls or self._queues or self._tables or self._unscored or self._completions
        )
        while True:
            with self._wake:
                # A pause before an idle step: a client that has just sent a request often sends another one.
                if self._wake.wait_for(lambda: self._stopped or has_work(), _QUIET_SECONDS):
                    return not self._stopped
            try:
                has_idle_work = next(idle, self) is not self
            except Exception:  # an idle step only prepares, so requests can still be served
                log.exception("the device cannot prepare for more")
                has_idle_work = False
            if not has_idle_work:
                with self._wake:
                    self._wake.wait_for(lambda: self._stopped or has_work())
                    return not self._stopped

    @property
    def _ready(self) -> Reader:
        """The reader, once it is loaded."""
        assert self.reader is not None
        return self.reader

    def _do_calls(self) -> None:
        """Runs the functions that other threads have handed over."""
        while True:
            with self._wake:
                if not self._calls:
                    return
                function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                if not isinstance(error, UserError):
                    log.exception("the device's work failed")
                future.set_exception(error)

    def _write(self) -> None:
        """Runs a round of every table: admits waiting rows, removes unwatched ones, and draws some tokens in each."""
        self._admit()
        for longest, table in list(self._tables.items()):
            try:
                self._draw_in_table(table)
            except Exception as error:
                self._give_up_table(longest, error)
            else:
                if not len(table):
                    del self._tables[longest]

    def _draw_in_table(self, table: Table) -> None:
        """Draws some tokens in each row of a table and tells the watchers."""
        unwatched = self._without_watchers(table.holders)
        table.remove(unwatched.__contains__)
        began, size = time.perf_counter(), table.size
        ended: list[Job] = []
        rows = table.advance(self._count(size))
        for job, tokens, done in rows:
            text = OPENING + self._ready.decoded(tokens)
            done = done or CLOSING in text
            if done:
                text = text.partition(CLOSING)[0] + (CLOSING if CLOSING in text else "")
                ended.append(job)
                self._unscored.append(job)
            else:
                text = text.rstrip("\ufffd")  # the last character may be incomplete
            if text != job.state.text or done:
                job.tell(State(text, description_of(text) if done else None))
        if rows:
            self._learn_pace(size, time.perf_counter() - began, table.drawn)
        table.remove(set(ended).__contains__)

    def _count(self, size: tuple[object, ...]) -> int:
        """Returns the number of tokens of the next round, from the pace at this size."""
        seconds = self._pace.get(size)
        return 4 if seconds is None else max(1, min(_MOST_TOKENS, round(_ROUND_SECONDS / seconds)))

    def _learn_pace(self, size: tuple[object, ...], seconds: float, tokens: int) -> None:
        """Records the seconds per token at this size."""
        if tokens and size != (0, 0):
            self._pace[size] = seconds / tokens

    def _admit(self) -> None:
        """Moves waiting rows into tables as far as there is room. The requests' queues take turns."""
        admitted: dict[int, list[Job]] = collections.defaultdict(list)
        with self._wake:
            waiting = len(self._queues)
            while self._queues and waiting:
                queue = self._queues.popleft()
                while queue and not queue[0].watchers:
                    self._forget(queue.popleft())
                if not queue:
                    waiting = len(self._queues)
                    continue
                longest = room_for(queue[0].limit, self._ready.most_new_tokens)
                table = self._tables.get(longest) or Table(self._ready.encoder, longest)
                if table.room > len(admitted[longest]):
                    admitted[longest].append(queue.popleft())
                    waiting = len(self._queues) + 1
                else:
                    waiting -= 1
                if queue:
                    self._queues.append(queue)
        for longest, jobs in admitted.items():
            if jobs:
                table = self._tables.setdefault(longest, Table(self._ready.encoder, longest))
                entries = [Entry(job.vector, job.limit, job.temperature, job.seed) for job in jobs]
                try:
                    table.add(entries, jobs)
                except Exception as error:
                    self._give_up_table(longest, error, jobs)

    def _without_watchers(self, jobs: Iterable[Job]) -> set[Job]:
        """Returns the jobs without watchers, and forgets them, so that no later request can join them."""
        with self._wake:
            unwatched = {job for job in jobs if not job.watchers}
            for job in unwatched:
                self._forget(job)
        return unwatched

    def _forget(self, job: Job) -> None:
        """Removes a job from those that later requests may join. The lock must be held."""
        if job.key is not None and self._flying.get(job.key) is job:
            del self._flying[job.key]

    def _score(self) -> None:
        """Scores some of the explanations that have ended."""
        jobs = [self._unscored.popleft() for _ in range(min(_SCORED_AT_ONCE, len(self._unscored)))]
        unwatched = self._without_watchers(jobs)
        jobs = [job for job in jobs if job not in unwatched]
        if jobs:
            self._score_together(jobs)

    def _score_together(self, jobs: Sequence[Job]) -> None:
        """Scores explanations in one batch. If it fails, each is scored by itself, so that only the bad one fails."""
        try:
            scores = self._ready.score(
                [job.state.description or "" for job in jobs], np.stack([job.vector for job in jobs])
            )
        except Exception as error:
            if len(jobs) == 1:
                log.exception("an explanation cannot be scored")
                self._fail(jobs, error)
                return
            for job in jobs:
                self._score_together([job])
            return
        for job, mse, cos in zip(jobs, *scores, strict=True):
            state = dataclasses.replace(job.state, mse=float(mse), cos=float(cos))
            with self._wake:
                self._forget(job)
                if job.key is not None:
                    self._known[job.key] = state
                    while len(self._known) > _CACHED:
                        self._known.popitem(last=False)
            job.tell(state)

    def _continue_completions(self) -> None:
        """Runs a round of every completion."""
        for completion in list(self._completions):
            error = None
            if not completion.cancelled:
                try:
                    if self._draw(completion):
                        continue
                except Exception as failure:
                    log.exception("a completion failed")
                    error = _error_text(failure)
            with self._wake:
                self._completions.remove(completion)
            if error:
                completion.watcher([], True, error)

    def _draw(self, completion: Completion) -> bool:
        """Draws some tokens of a completion and calls its watcher. Returns whether it goes on."""
        if completion.table is None:
            source = self._ready.padded(completion.ids, left=True, room=completion.limit)
            most = self._ready.subject.arch.most_tokens
            room = room_for(completion.limit, most - len(source[0]) if most else CAPACITIES[-1])
            completion.table = Table(self._ready.completer, room)
            completion.table.add(
                [Entry(source, completion.limit, completion.temperature, completion.seed)], [completion]
            )
        began, size = time.perf_counter(), ("completion", *completion.table.size)
        ((_, tokens, done),) = completion.table.advance(self._count(size))
        self._learn_pace(size, time.perf_counter() - began, completion.table.drawn)
        completion.watcher(tokens.tolist(), done, None)
        return not done

    def _give_up_table(self, longest: int, error: Exception, more: Sequence[Job] = ()) -> None:
        """Gives up the explanations in one table, and `more`, and tells their watchers. The other tables go on."""
        log.error("the device's work failed", exc_info=error)
        jobs = {*self._tables.pop(longest).holders, *more} - {*self._unscored}
        self._fail(list(jobs), error)

    def _give_up_all(self, error: Exception) -> None:
        """Gives up all explanations under way and tells their watchers. Later requests begin with new tables."""
        jobs = [job for table in self._tables.values() for job in table.holders] + list(self._unscored)
        self._tables, self._unscored = {}, collections.deque()
        self._fail(jobs, error)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Tells the watchers of jobs that these have failed."""
        with self._wake:
            for job in jobs:
                self._forget(job)
        for job in jobs:
            job.tell(dataclasses.replace(job.state, error=_error_text(error)))


def _error_text(error: Exception) -> str:
    """Returns an error's type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"
