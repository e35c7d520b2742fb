"""The explanations and completions that requests hand to the engine, with the watchers of their states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from nlae_jax.roles.protocol import CLOSING, OPENING
from nlae_jax.serve.tables import Table


@dataclasses.dataclass(frozen=True)
class State:
    """The state of an explanation. `text` is everything that the encoder has written, with the opening tag.

    `description` is set once the explanation has ended, `mse` and `cos` once it is scored; `cos` is NaN for a vector of
    zeros. `error` says why the explanation was given up.
    """

    text: str = OPENING
    description: str | None = None
    mse: float | None = None
    cos: float | None = None
    error: str | None = None

    @property
    def final(self) -> bool:
        """Whether the state will not change any more."""
        return self.mse is not None or self.error is not None


@dataclasses.dataclass(eq=False)
class Job:
    """An explanation to be written, and the watchers of its state. Requests for the same vector share one."""

    vector: np.ndarray
    limit: int
    temperature: float
    seed: int
    key: bytes | None
    watchers: list[Callable[[State], None]]
    state: State = State()

    def tell(self, state: State) -> None:
        """Sets the state and calls all watchers with it."""
        self.state = state
        for watcher in list(self.watchers):
            watcher(state)


@dataclasses.dataclass(eq=False)
class Completion:
    """A text that the subject continues. `watcher` gets all new ids so far, whether it has ended, and an error text."""

    ids: Sequence[int]
    limit: int
    temperature: float
    seed: int
    watcher: Callable[[list[int], bool, str | None], None]
    cancelled: bool = False
    table: Table | None = None


def description_of(text: str) -> str:
    """Returns the stripped text between the tags, or everything after the opening tag where it was not closed."""
    return text.removeprefix(OPENING).partition(CLOSING)[0].strip()
