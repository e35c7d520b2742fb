"""Decoders trained alike on other words about the same activations: what do explanations say beyond copying?

A pair's own decoder reads explanations because it was trained on them. Whether its encoder says more than the last
words of the context, or than the subject's next tokens, can only be told by decoders that were trained alike, from
the same start, on the same activations, for each of the three.
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
_LEARNING_RATE, _FULL_LEARNING_RATE = 2e-3, 2e-5  # of adapters, and of all weights
_TEST_SHARE = 4  # one document in so many is not trained on


def trained_controls(work: Work, roles: Roles, pair: Pair, num_steps: int) -> None:
    """Puts the figure `trained_decoder`: FVE, on documents held out, of a decoder for each kind of words.

    And, of the same rows, how much more that of explanations is than each of the others.

    Each is trained for `num_steps` steps of 16 from the subject's own blocks and the identity head. Nothing is done
    where `num_steps` is 0, where no texts are known, or where there are too few documents to hold some out.
    """
    names, index = np.unique(work.rows.document, return_inverse=True)
    if not num_steps:
        return
    if len(names) < _TEST_SHARE or len(work.has_context) < len(work.rows.h):
        warn(f"--control-steps: no decoder is trained: it takes every activation's text, and {_TEST_SHARE} documents")
        return
    test = index % _TEST_SHARE == 0
    rows = np.flatnonzero(test)
    own: dict[str, np.ndarray] = {}
    permuted: dict[str, np.ndarray] = {}
    for name, texts in _words(work).items():
        rebuilt = _rebuilt_by_training(work, roles, pair, name, texts, test, num_steps)
        own[name], permuted[name] = work.mse_of([texts[row] for row in rows], rebuilt[rows], rows)
    parts, wrong_parts = ({name: work.with_variance(mse) for name, mse in of.items()} for of in (own, permuted))
    put = work.ledger.put
    put("text", "trained_decoder", None, fve_of, parts=parts, part_controls={"permuted": wrong_parts})
    for key, name in (("beyond_last_words", "last_words"), ("beyond_next_tokens", "next_tokens")):
        more, more_wrong = (work.with_variance(of[name] - of["explanations"]) for of in (own, permuted))
        put("text", key, more, share_of, {"permuted": more_wrong})


def _words(work: Work) -> dict[str, list[str]]:
    """What is said of every activation: its explanation, as many tokens of its context's end, its next tokens."""
    tokenizer = work.pair.tokenizer
    length = [len(tokenizer.encode(one, add_special_tokens=False)) for one in work.texts]
    contexts = work.rows.contexts
    return {
        "explanations": work.texts,
        "last_words": [controls.last_words(tokenizer, *of) for of in zip(contexts, length, strict=True)],
        "next_tokens": [controls.next_tokens_text(ranked) for ranked in _all_ranked(work)],
    }


def _all_ranked(work: Work) -> list[list[str]]:
    """The subject's likeliest next tokens of every row."""
    ids, size = work.rows.context_ids, 8

    def compute(part: slice) -> dict[str, Any]:
        some = ids[part]
        return {"ranked": likeliest(work.pair.subject(), [*some, *some[:1] * (size - len(some))], 5)[: len(some)]}

    ranked: list[list[str]] = work.kept.run("all_next_tokens", len(ids), size, compute)["ranked"]
    return ranked


def _rebuilt_by_training(
    work: Work, roles: Roles, pair: Pair, name: str, texts: Sequence[str], test: np.ndarray, num_steps: int
) -> np.ndarray:
    """[N, d]: what a decoder trained on the rows not in `test` makes of every text; kept on disk as one part."""
    found = work.kept.run(
        f"trained_{name}_{num_steps}",
        len(texts),
        len(texts),
        lambda _: {"rebuilt": _train(work, roles, pair, name, texts, ~test, num_steps)},
        of=texts,
    )
    return np.asarray(found["rebuilt"])


def _train(
    work: Work, roles: Roles, pair: Pair, name: str, texts: Sequence[str], train: np.ndarray, num_steps: int
) -> np.ndarray:
    base = pair.base if pair.decoder_base is None else pair.decoder_base
    start = base or work.pair.subject().params
    trained = init_decoder(roles, start, jax.random.PRNGKey(work.seed))
    rate = _LEARNING_RATE if roles.rank else _FULL_LEARNING_RATE
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(sft_schedule(rate, num_steps, 0.05)))
    whole = roles.with_whole_prompts()
    step = jax.jit(steps.decoder_sft_step(whole, optimizer), donate_argnums=0)
    known = work.pair.tokenizer, roles.decoder.protocol
    prompts = [known_decoder_ids(*known, text, roles.decoder.arch.vocab_size) for text in texts]
    ids, length = pad(prompts, -(-max(map(len, prompts)) // 32) * 32)
    frozen: Params = {"base": base, "baselines": direction.baselines(jnp.asarray(work.rows.h[train]))}
    state = RoleState(jnp.zeros((), jnp.int32), trained, jax.jit(optimizer.init)(trained))
    rows = np.flatnonzero(train)
    rng = np.random.default_rng(work.seed)
    with progress(num_steps, f"eval: a decoder of {name.replace('_', ' ')}") as bar:
        for _ in range(num_steps):
            some = rng.choice(rows, BATCH)
            batch = {"h": work.rows.h[some], "ids": ids[some], "length": length[some]}
            state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, batch))
            bar.advance(loss=metrics["loss"])
    variables = lambda trained: roles.decoder_variables(base, trained)  # noqa: E731
    apply = jax.jit(lambda trained, ids, length: whole.decoder.apply(variables(trained), ids, length))
    found = []
    for begin in range(0, len(ids), BATCH):
        some = np.minimum(np.arange(begin, begin + BATCH), len(ids) - 1)
        found.append(np.asarray(apply(state.trained, jnp.asarray(ids[some]), jnp.asarray(length[some]))))
    return np.concatenate(found)[: len(ids)]
