"""Trains decoders on three kinds of text about the same activations, to measure what explanations add to copying.

A pair's own decoder was trained on explanations, so it reads explanations better than other texts. A fair comparison
needs a new decoder for each kind of text: for explanations, for the last words of the context, and for the subject's
likeliest next tokens. All three start from the same weights and are trained in the same way on the same activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlae_jax.evaluate import controls
from nlae_jax.evaluate.estimate import fve_of, share_of
from nlae_jax.evaluate.rows import EvaluatedRows
from nlae_jax.evaluate.work import Work
from nlae_jax.lm.tokens import pad, width_within
from nlae_jax.roles import direction
from nlae_jax.roles.pair import Pair, Params, Roles
from nlae_jax.roles.protocol import known_decoder_ids
from nlae_jax.runtime.progress import progress, warn
from nlae_jax.train import steps
from nlae_jax.train.state import RoleState, init_decoder, sft_schedule

STEPS = 60  # of each decoder, unless the user names another number
_FEWEST = 128  # activations: decoders of fewer are so bad and so uncertain that they are trained only on request
BATCH = 16
_RANK = 16  # of the adapters, for a pair that has none
_LEARNING_RATE = 2e-3
TEST_SHARE = 4  # one document in so many is held out
_NARROWEST = 32  # a batch's prompts are padded to this length, or to twice, four times, ... of it


def default_steps(sections: Sequence[str], rows: EvaluatedRows) -> int:
    """Returns the steps of each decoder if the user has named none.

    They are 0 without the section text, for few rows, and for rows that no decoder can be trained on. The rows may be
    without activations.
    """
    return STEPS if "text" in sections and len(rows.document) >= _FEWEST and _has_what_training_needs(rows) else 0


def _has_what_training_needs(rows: EvaluatedRows) -> bool:
    """Returns whether the text of every activation is known, and whether some documents can be held out."""
    return len(np.unique(rows.document)) >= TEST_SHARE and all(len(ids) > 1 for ids in rows.context_ids)


def trained_controls(work: Work, roles: Roles, pair: Pair, num_steps: int) -> None:
    """Adds the figures `trained_decoder`, `beyond_last_words` and `beyond_next_tokens` to the ledger.

    `trained_decoder` is the FVE, on held-out documents, of one decoder for each kind of text. The other two figures are
    the FVE of the decoder of explanations minus the FVE of each of the other decoders, on the same rows.

    Each decoder starts from the subject's blocks and the identity head. Adapters and head are trained for `num_steps`
    steps of 16 activations. Nothing is done if `num_steps` is 0. If texts are missing or there are too few documents,
    the function warns and trains nothing.
    """
    if not num_steps:
        return
    if not _has_what_training_needs(work.rows):
        warn(
            "--control-steps: no decoder is trained, because this needs the text of every activation and at least "
            f"{TEST_SHARE} documents"
        )
        return
    _, index = np.unique(work.rows.document, return_inverse=True)
    test = index % TEST_SHARE == 0
    rows = np.flatnonzero(test)
    matched: dict[str, np.ndarray] = {}
    permuted: dict[str, np.ndarray] = {}
    trainer = _Trainer(work, roles, pair, num_steps)
    for name, texts in _texts(work).items():
        rebuilt = _rebuilt_by_training(work, trainer, name, texts, test)
        matched[name], permuted[name] = work.mse_of([texts[row] for row in rows], rebuilt, rows)
    parts, permuted_parts = (
        {name: work.with_variance(mse) for name, mse in by_name.items()} for by_name in (matched, permuted)
    )
    put = work.ledger.put
    put("text", "trained_decoder", None, fve_of, parts=parts, part_controls={"permuted": permuted_parts})
    for key, name in (("beyond_last_words", "last_words"), ("beyond_next_tokens", "next_tokens")):
        gain, permuted_gain = (
            work.with_variance(by_name[name] - by_name["explanations"]) for by_name in (matched, permuted)
        )
        put("text", key, gain, share_of, {"permuted": permuted_gain})


def _texts(work: Work) -> dict[str, list[str]]:
    """Returns the three kinds of text about every activation. The last words have as many tokens as the explanation."""
    tokenizer = work.pair.tokenizer
    unknown = np.setdiff1d(np.arange(len(work.texts)), list(work.ranked))
    ranked = {**work.ranked, **work.next_tokens(unknown)}
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in work.texts]
    return {
        "explanations": work.texts,
        "last_words": [
            controls.last_words(tokenizer, context, length)
            for context, length in zip(work.rows.contexts, lengths, strict=True)
        ],
        "next_tokens": [controls.next_tokens_text(ranked[row]) for row in range(len(work.texts))],
    }


def _rebuilt_by_training(
    work: Work, trainer: _Trainer, name: str, texts: Sequence[str], test: np.ndarray
) -> np.ndarray:
    """Calls `_Trainer.rebuilt`. The result is kept on disk as one part."""
    count = int(test.sum())
    columns = work.kept.run(
        f"trained_decoder_{name}_{trainer.num_steps}",
        count,
        count,
        lambda _: {"rebuilt": trainer.rebuilt(name, texts, test)},
        unit="text",
        of=[texts, test.tolist()],
    )
    return np.asarray(columns["rebuilt"])


class _Trainer:
    """Trains decoders that differ in nothing but their texts. They share the compiled programs."""

    def __init__(self, work: Work, roles: Roles, pair: Pair, num_steps: int) -> None:
        base = pair.base if pair.decoder_base is None else pair.decoder_base
        if not roles.rank:
            # A full copy with its optimiser may not fit beside the pair, and adapters learn more in few steps.
            subject = work.pair.subject()
            base, decoder = subject.params, roles.decoder.clone(arch=subject.arch)
            roles = dataclasses.replace(roles, decoder=decoder, rank=_RANK, dtype=None)
        self._work, self._roles, self._base, self.num_steps = work, roles, base, num_steps
        schedule = sft_schedule(_LEARNING_RATE, num_steps, 0.05)
        self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
        whole = roles.with_whole_prompts()
        self._step = jax.jit(steps.decoder_sft_step(whole, self._optimizer), donate_argnums=0)
        variables = lambda base, trained: roles.decoder_variables(base, trained)  # noqa: E731
        self._apply = jax.jit(
            lambda base, trained, ids, length: whole.decoder.apply(variables(base, trained), ids, length)
        )

    def rebuilt(self, name: str, texts: Sequence[str], test: np.ndarray) -> np.ndarray:
        """Trains a decoder on the rows outside `test` [N] of N texts. Returns its reconstructions [M, d] of the others.

        Rows are drawn by the seed, so all decoders see the same activations in the same order.
        """
        work, roles = self._work, self._roles
        tokenizer, protocol = work.pair.tokenizer, roles.decoder.protocol
        vocab_size, most = roles.decoder.arch.vocab_size, roles.decoder.arch.most_tokens
        prompts = [known_decoder_ids(tokenizer, protocol, text, vocab_size) for text in texts]
        train, rng = np.flatnonzero(~test), np.random.default_rng(work.seed)
        frozen: Params = {"base": self._base, "baselines": direction.baselines(jnp.asarray(work.rows.h[train]))}
        trained = init_decoder(roles, self._base, jax.random.PRNGKey(work.seed))
        state = RoleState(jnp.zeros((), jnp.int32), trained, jax.jit(self._optimizer.init)(trained))
        with progress(self.num_steps, f"eval: a decoder of {name.replace('_', ' ')}") as bar:
            for _ in range(self.num_steps):
                drawn = rng.choice(train, BATCH)
                ids, length = _padded([prompts[row] for row in drawn], most)
                batch = {"h": work.rows.h[drawn], "ids": ids, "length": length}
                state, metrics = self._step(state, frozen, jax.tree.map(jnp.asarray, batch))
                bar.advance(loss=metrics["loss"])
        held_out = np.flatnonzero(test)
        order = held_out[np.argsort([len(prompts[row]) for row in held_out], kind="stable")]
        rebuilt = np.zeros((len(texts), work.rows.h.shape[1]), np.float32)
        for begin in range(0, len(order), BATCH):
            rows = order[np.minimum(np.arange(begin, begin + BATCH), len(order) - 1)]
            padded = _padded([prompts[row] for row in rows], most)
            rebuilt[rows] = np.asarray(self._apply(self._base, state.trained, *padded))
        return rebuilt[held_out]


def _padded(prompts: Sequence[Sequence[int]], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts on the right to 32, 64, 128, 256, ... tokens. Returns ids [B, T] and lengths [B].

    A program is compiled for each of these lengths, so few lengths matter more than little padding. `most` is the
    decoder's `Arch.most_tokens`.
    """
    longest = max(map(len, prompts))
    return pad(prompts, width_within(max(_NARROWEST, 1 << (longest - 1).bit_length()), longest, most))
