"""The device at work for many at once: one thread that owns it, and what others ask of that thread.

Explanations of all requests are written in the same tables, a few tokens at a time; between two rounds whatever else
needs the device is done (a text is read, a description scored, a completion goes on). A request's rows wait in a queue
of its own, and the queues take turns, so that a long text does not keep a single token waiting.
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
from nlae_jax.serve.reading import Reader
from nlae_jax.serve.tables import CAPACITIES, Entry, Table, room_for

_ROUND_SECONDS = 0.25  # that a round of decoding should take: words are to come as if somebody wrote them
_STOP_SECONDS = 10  # that a round, or loading, may take to come to its end
_QUIET_SECONDS = 2.0  # after which the device prepares for what was not asked for yet
_MOST_TOKENS = 16  # a round's
_SCORED_AT_ONCE = 16
_CACHED = 20_000  # explanations that are kept

log = logging.getLogger("nlae_jax")


@dataclasses.dataclass(frozen=True)
class Explained:
    """What is known of an explanation: `text` is everything that the encoder has written, the opening tag included.

    `description` is there once it has ended, `mse` and `cos` once it is scored; `cos` is NaN for a vector of zeros.
    `error` says why there will be nothing more.
    """

    text: str = OPENING
    description: str | None = None
    mse: float | None = None
    cos: float | None = None
    error: str | None = None

    @property
    def final(self) -> bool:
        return self.mse is not None or self.error is not None


@dataclasses.dataclass(eq=False)
class Work:
    """An explanation to be written, and who waits for it. Several may: the same vector is explained once."""

    vector: np.ndarray
    limit: int
    temperature: float
    seed: int
    key: bytes | None
    watchers: list[Callable[[Explained], None]]
    state: Explained = Explained()

    def tell(self, state: Explained) -> None:
        self.state = state
        for watcher in list(self.watchers):
            watcher(state)


@dataclasses.dataclass(eq=False)
class Completion:
    """A text that the subject goes on with. `watcher` is told all its new ids so far, and whether they are all."""

    ids: Sequence[int]
    limit: int
    temperature: float
    seed: int
    watcher: Callable[[list[int], bool, str | None], None]
    cancelled: bool = False
    table: Table | None = None


def description_of(text: str) -> str:
    """What stands between the tags, stripped; everything after the opening tag where it was never closed."""
    return text.removeprefix(OPENING).partition(CLOSING)[0].strip()


class Engine:
    """`load` makes the `Reader`; it runs in the engine's thread, and `reader` is there when it is done."""

    def __init__(self, load: Callable[[], Reader], warm: bool = True) -> None:
        self.reader: Reader | None = None
        self.failure: BaseException | None = None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None
        self._load, self._warm = load, warm
        self._wake = threading.Condition()
        self._calls: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._queues: collections.deque[collections.deque[Work]] = collections.deque()
        self._completions: list[Completion] = []
        self._unscored: collections.deque[Work] = collections.deque()
        self._tables: dict[int, Table] = {}
        self._pace: dict[Any, float] = {}
        self._known: collections.OrderedDict[bytes, Explained] = collections.OrderedDict()
        self._flying: dict[bytes, Work] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After the round that is under way; nobody is told anything more."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        self._thread.join(timeout=_STOP_SECONDS)

    # What other threads ask for.

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Runs `function` in the device's thread, before the next round."""
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
        watch: Callable[[int, Explained], None],
    ) -> Callable[[], None]:
        """Explanations of a request's vectors. Returns what cancels those that nobody else waits for.

        `watch(number, state)` is called from the device's thread, or at once for what is known already. A `key` says
        that explanations with the same key, limit and temperature are the same: they are written once, and kept.
        """
        queue: collections.deque[Work] = collections.deque()
        joined: list[tuple[Work, Callable[[Explained], None]]] = []
        known: list[tuple[int, Explained]] = []
        with self._wake:
            for number, (vector, key, seed) in enumerate(zip(vectors, keys, seeds, strict=True)):
                full = None if key is None else hashlib.sha256(b"%d %r " % (limit, temperature) + key).digest()
                if full is not None and (found := self._known.get(full)) is not None:
                    self._known.move_to_end(full)
                    known.append((number, found))
                    continue
                watcher = lambda state, number=number: watch(number, state)  # noqa: E731
                work = self._flying.get(full) if full is not None else None
                if work is None:
                    work = Work(np.asarray(vector, np.float32), limit, temperature, seed, full, [])
                    queue.append(work)
                    if full is not None:
                        self._flying[full] = work
                work.watchers.append(watcher)
                joined.append((work, watcher))
            if queue:
                self._queues.append(queue)
                self._wake.notify_all()
        for number, state in known:
            watch(number, state)

        def cancel() -> None:
            with self._wake:
                for work, watcher in joined:
                    if watcher in work.watchers:
                        work.watchers.remove(watcher)

        return cancel

    def complete(self, completion: Completion) -> None:
        with self._wake:
            self._completions.append(completion)
            self._wake.notify_all()

    # The device's thread.

    def _run(self) -> None:
        try:
            reader = self._load()
            if self._warm:
                reader.warm()
            self.reader = reader
        except BaseException as error:  # also an exit that a library asks for: this thread is not the one to do it
            self.failure = error
            self.on_failure()
            return
        self.on_ready()
        more = reader.warm_more() if self._warm else iter(())
        while self._wait(more):
            self._do_calls()
            for step in (self._write, self._score, self._go_on):
                try:
                    step()
                except Exception as error:
                    log.exception("the device's work failed")
                    self._give_up(error)

    def _wait(self, idle: Iterator[None]) -> bool:
        """Until there is something to do; False when it is time to stop. What `idle` yields between is done first."""
        asked = lambda: (  # noqa: E731
            self._calls or self._queues or self._tables or self._unscored or self._completions
        )
        while True:
            with self._wake:
                # A moment of quiet first: whoever has just asked for something often asks for more.
                if self._wake.wait_for(lambda: self._stopped or asked(), _QUIET_SECONDS):
                    return not self._stopped
            try:
                left = next(idle, self) is not self
            except Exception:  # it was only a preparation
                log.exception("the device cannot prepare for more")
                left = False
            if not left:
                with self._wake:
                    self._wake.wait_for(lambda: self._stopped or asked())
                    return not self._stopped

    @property
    def _ready(self) -> Reader:
        assert self.reader is not None
        return self.reader

    def _do_calls(self) -> None:
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
        """A round of every table: who is gone leaves, who waits comes, all write some tokens."""
        self._admit()
        for longest, table in list(self._tables.items()):
            try:
                self._write_some(table)
            except Exception as error:
                self._lose(longest, error)
            else:
                if not len(table):
                    del self._tables[longest]

    def _write_some(self, table: Table) -> None:
        gone = self._without_watchers(table.holders)
        table.remove(gone.__contains__)
        began, size = time.perf_counter(), table.size
        ended: list[Work] = []
        rows = table.advance(self._count(size))
        for work, tokens, done in rows:
            text = OPENING + self._ready.decoded(tokens)
            done = done or CLOSING in text
            if done:
                text = text.partition(CLOSING)[0] + (CLOSING if CLOSING in text else "")
                ended.append(work)
                self._unscored.append(work)
            else:
                text = text.rstrip("\ufffd")  # the rest of a character is still to come
            if text != work.state.text or done:
                work.tell(Explained(text, description_of(text) if done else None))
        if rows:
            self._learn_pace(size, time.perf_counter() - began, table.drawn)
        table.remove(set(ended).__contains__)

    def _count(self, size: tuple[object, ...]) -> int:
        """Tokens of the next round."""
        seconds = self._pace.get(size)
        return 4 if seconds is None else max(1, min(_MOST_TOKENS, round(_ROUND_SECONDS / seconds)))

    def _learn_pace(self, size: tuple[object, ...], seconds: float, tokens: int) -> None:
        if tokens and size != (0, 0):
            self._pace[size] = seconds / tokens

    def _admit(self) -> None:
        taken: dict[int, list[Work]] = collections.defaultdict(list)
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
                if table.room > len(taken[longest]):
                    taken[longest].append(queue.popleft())
                    waiting = len(self._queues) + 1
                else:
                    waiting -= 1
                if queue:
                    self._queues.append(queue)
        for longest, works in taken.items():
            if works:
                table = self._tables.setdefault(longest, Table(self._ready.encoder, longest))
                entries = [Entry(work.vector, work.limit, work.temperature, work.seed) for work in works]
                try:
                    table.add(entries, works)
                except Exception as error:
                    self._lose(longest, error, works)

    def _without_watchers(self, works: Iterable[Work]) -> set[Work]:
        """Those that nobody waits for: nobody will from here on, since they cannot be found any more."""
        with self._wake:
            gone = {work for work in works if not work.watchers}
            for work in gone:
                self._forget(work)
        return gone

    def _forget(self, work: Work) -> None:
        if work.key is not None and self._flying.get(work.key) is work:
            del self._flying[work.key]

    def _score(self) -> None:
        works = [self._unscored.popleft() for _ in range(min(_SCORED_AT_ONCE, len(self._unscored)))]
        gone = self._without_watchers(works)
        works = [work for work in works if work not in gone]
        if works:
            self._score_together(works)

    def _score_together(self, works: Sequence[Work]) -> None:
        """Where this fails, each by itself: one description that cannot be read is no fault of the others."""
        try:
            scores = self._ready.score([w.state.description or "" for w in works], np.stack([w.vector for w in works]))
        except Exception as error:
            if len(works) == 1:
                log.exception("an explanation cannot be scored")
                self._fail(works, error)
                return
            for work in works:
                self._score_together([work])
            return
        for work, mse, cos in zip(works, *scores, strict=True):
            state = dataclasses.replace(work.state, mse=float(mse), cos=float(cos))
            with self._wake:
                self._forget(work)
                if work.key is not None:
                    self._known[work.key] = state
                    while len(self._known) > _CACHED:
                        self._known.popitem(last=False)
            work.tell(state)

    def _go_on(self) -> None:
        """A round of every completion."""
        for completion in list(self._completions):
            error = None
            if not completion.cancelled:
                try:
                    if self._one_more(completion):
                        continue
                except Exception as failure:
                    log.exception("a completion failed")
                    error = _said(failure)
            with self._wake:
                self._completions.remove(completion)
            if error:
                completion.watcher([], True, error)

    def _one_more(self, completion: Completion) -> bool:
        """Whether there is more to come."""
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

    def _lose(self, longest: int, error: Exception, more: Sequence[Work] = ()) -> None:
        """What is written in one table is lost, and `more`: those who wait are told so; the other tables go on."""
        log.error("the device's work failed", exc_info=error)
        works = {*self._tables.pop(longest).holders, *more} - {*self._unscored}
        self._fail(list(works), error)

    def _give_up(self, error: Exception) -> None:
        """Whatever is being written is lost: those who wait are told so, and the next ones begin afresh."""
        works = [work for table in self._tables.values() for work in table.holders] + list(self._unscored)
        self._tables, self._unscored = {}, collections.deque()
        self._fail(works, error)

    def _fail(self, works: Sequence[Work], error: Exception) -> None:
        with self._wake:
            for work in works:
                self._forget(work)
        for work in works:
            work.tell(dataclasses.replace(work.state, error=_said(error)))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
