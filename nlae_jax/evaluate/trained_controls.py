"""Trains decoders on three kinds of text about the same activations, to measure what explanations add to copying.

A pair's own decoder was trained on explanations, so it reads explanations better than other texts. A fair comparison
needs a new decoder for each kind of text: for explanations, for the last words of the context, and for the subject's
likeliest next tokens. All three start from the same weights and are trained in the same way on the same activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlae_jax.evaluate import controls
from nlae_jax.evaluate.estimate import fve_of, share_of
from nlae_jax.evaluate.rows import likeliest
from nlae_jax.evaluate.work import Work
from nlae_jax.lm.tokens import pad
from nlae_jax.roles import direction
from nlae_jax.roles.pair import Pair, Params, Roles
from nlae_jax.roles.protocol import known_decoder_ids
from nlae_jax.runtime.progress import progress, warn
from nlae_jax.train import steps
from nlae_jax.train.state import RoleState, init_decoder, sft_schedule

BATCH = 16
_LEARNING_RATE, _FULL_LEARNING_RATE = 2e-3, 2e-5  # for adapters, and for full fine-tuning
_TEST_SHARE = 4  # one document in so many is held out


def trained_controls(work: Work, roles: Roles, pair: Pair, num_steps: int) -> None:
    """Adds the figures `trained_decoder`, `beyond_last_words` and `beyond_next_tokens` to the ledger.

    `trained_decoder` is the FVE, on held-out documents, of one decoder for each kind of text. The other two figures are
    the FVE of the decoder of explanations minus the FVE of each of the other decoders, on the same rows.

    Each decoder starts from the subject's blocks and the identity head. It is trained for `num_steps` steps of 16
    activations. Nothing is done if `num_steps` is 0. If texts are missing or there are too few documents, the function
    warns and trains nothing.
    """
    names, index = np.unique(work.rows.document, return_inverse=True)
    if not num_steps:
        return
    if len(names) < _TEST_SHARE or len(work.has_context) < len(work.rows.h):
        warn(
            "--control-steps: no decoder is trained, because this needs the text of every activation and at least "
            f"{_TEST_SHARE} documents"
        )
        return
    test = index % _TEST_SHARE == 0
    rows = np.flatnonzero(test)
    matched: dict[str, np.ndarray] = {}
    permuted: dict[str, np.ndarray] = {}
    for name, texts in _texts(work).items():
        rebuilt = _rebuilt_by_training(work, roles, pair, name, texts, test, num_steps)
        matched[name], permuted[name] = work.mse_of([texts[row] for row in rows], rebuilt[rows], rows)
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
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in work.texts]
    return {
        "explanations": work.texts,
        "last_words": [
            controls.last_words(tokenizer, context, length)
            for context, length in zip(work.rows.contexts, lengths, strict=True)
        ],
        "next_tokens": [controls.next_tokens_text(ranked) for ranked in _all_ranked(work)],
    }


def _all_ranked(work: Work) -> list[list[str]]:
    """Returns the subject's five likeliest next tokens after every context."""
    ids, size = work.rows.context_ids, 8

    def compute(part: slice) -> dict[str, Any]:
        contexts = ids[part]
        full_batch = [*contexts, *contexts[:1] * (size - len(contexts))]
        return {"ranked": likeliest(work.pair.subject(), full_batch, 5)[: len(contexts)]}

    ranked: list[list[str]] = work.kept.run("all_next_tokens", len(ids), size, compute)["ranked"]
    return ranked


def _rebuilt_by_training(
    work: Work, roles: Roles, pair: Pair, name: str, texts: Sequence[str], test: np.ndarray, num_steps: int
) -> np.ndarray:
    """Trains a decoder on the rows outside `test` [N], and returns its reconstructions [N, d] from all N texts.

    The result is kept on disk as one part.
    """
    columns = work.kept.run(
        f"trained_{name}_{num_steps}",
        len(texts),
        len(texts),
        lambda _: {"rebuilt": _train(work, roles, pair, name, texts, ~test, num_steps)},
        of=texts,
    )
    return np.asarray(columns["rebuilt"])


def _train(
    work: Work, roles: Roles, pair: Pair, name: str, texts: Sequence[str], train: np.ndarray, num_steps: int
) -> np.ndarray:
    """Trains a decoder on the rows in `train` [N], and returns its reconstructions [N, d] float32 from all N texts."""
    base = pair.base if pair.decoder_base is None else pair.decoder_base
    start = base or work.pair.subject().params
    trained = init_decoder(roles, start, jax.random.PRNGKey(work.seed))
    rate = _LEARNING_RATE if roles.rank else _FULL_LEARNING_RATE
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(sft_schedule(rate, num_steps, 0.05)))
    whole = roles.with_whole_prompts()
    step = jax.jit(steps.decoder_sft_step(whole, optimizer), donate_argnums=0)
    tokenizer, protocol = work.pair.tokenizer, roles.decoder.protocol
    prompts = [known_decoder_ids(tokenizer, protocol, text, roles.decoder.arch.vocab_size) for text in texts]
    ids, length = pad(prompts, -(-max(map(len, prompts)) // 32) * 32)
    frozen: Params = {"base": base, "baselines": direction.baselines(jnp.asarray(work.rows.h[train]))}
    state = RoleState(jnp.zeros((), jnp.int32), trained, jax.jit(optimizer.init)(trained))
    rows = np.flatnonzero(train)
    rng = np.random.default_rng(work.seed)
    with progress(num_steps, f"eval: a decoder of {name.replace('_', ' ')}") as bar:
        for _ in range(num_steps):
            drawn = rng.choice(rows, BATCH)
            batch = {"h": work.rows.h[drawn], "ids": ids[drawn], "length": length[drawn]}
            state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, batch))
            bar.advance(loss=metrics["loss"])
    variables = lambda trained: roles.decoder_variables(base, trained)  # noqa: E731
    apply = jax.jit(lambda trained, ids, length: whole.decoder.apply(variables(trained), ids, length))
    rebuilt = []
    for begin in range(0, len(ids), BATCH):
        batch_rows = np.minimum(np.arange(begin, begin + BATCH), len(ids) - 1)
        rebuilt.append(np.asarray(apply(state.trained, jnp.asarray(ids[batch_rows]), jnp.asarray(length[batch_rows]))))
    return np.concatenate(rebuilt)[: len(ids)]
