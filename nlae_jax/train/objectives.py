"""The maths of training: directions, FVE, rewards, advantages, the policy objective. All float32, all pure."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nlae_jax.lm.products import einsum
from nlae_jax.roles.direction import unit_direction

# What a sample earns whose explanation could not be read: as much as an orthogonal reconstruction.
FAILED_MSE = 2.0


REWARDS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "neg_mse": lambda mse: -mse,
    "neg_log_mse": lambda mse: -jnp.log(mse + 1e-6),
}


def rewards(mse: jax.Array, valid: jax.Array, penalty: jax.Array, kind: str) -> jax.Array:
    """Reward of each sample, [...] float32, for one of `REWARDS`, less its `penalty` (at least 0).

    A readable sample earns max(R(mse) - penalty, -2). One whose explanation could not be read earns -2 - penalty and is
    trained on. So no unreadable sample ever earns more than a readable one, whatever the kind, the mse (up to 4) and
    the penalties: else RL would learn not to close its tags where reconstructions are poor.
    """
    return jnp.where(valid, jnp.maximum(REWARDS[kind](mse) - penalty, -FAILED_MSE), -FAILED_MSE - penalty)


# Of the contrastive reward, in units of mse: about the spread of the mse over activations of one kind of text.
CONTRAST_TEMPERATURE = 0.1


def contrast(reconstruction_BxGxD: jax.Array, h_BxD: jax.Array, valid_BxG: jax.Array) -> jax.Array:
    """How well a reconstruction tells its own activation from the batch's others, [B, G] float32 in [-2 log B, 0].

    InfoNCE (van den Oord et al. 2018) over the batch: log softmax of -mse / temperature at its own activation. Chance
    is -log B; twice that is the least, and what a failed extraction earns.
    """
    own, other = unit_direction(reconstruction_BxGxD), unit_direction(h_BxD)
    mse_BxGxB = 2.0 - 2.0 * einsum("bgd,cd->bgc", own, other) / h_BxD.shape[-1]
    chosen = jax.nn.log_softmax(-mse_BxGxB / CONTRAST_TEMPERATURE, axis=-1)
    score = jnp.einsum("bgb->bg", chosen)
    least = -2.0 * jnp.log(jnp.float32(max(h_BxD.shape[0], 2)))
    return jnp.where(valid_BxG, jnp.maximum(score, least), least)


def group_advantages(reward_BxG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GRPO (Shao et al. 2024): (r - group mean) / (group std + eps), and which groups [B] have no spread at all."""
    std = reward_BxG.std(-1, keepdims=True)
    advantage = (reward_BxG - reward_BxG.mean(-1, keepdims=True)) / (std + 1e-6)
    # Told from the range, and set to zero: the mean of equal numbers may be off by a rounding error, and so is their
    # standard deviation; their ratio would be a signal out of nothing.
    no_spread = reward_BxG.max(-1) - reward_BxG.min(-1) < 1e-6
    return jnp.where(no_spread[:, None], 0.0, advantage), no_spread


def count(mask: jax.Array) -> jax.Array:
    """How many are True, at least 1, float32: what a masked mean is divided by."""
    return jnp.maximum(mask.astype(jnp.float32).sum(), 1.0)


def masked_mean(x: jax.Array, mask: jax.Array, of: jax.Array | None = None) -> jax.Array:
    """Mean of x where mask; 0 where nothing is. A part of a batch gives the whole's `count` as `of`: parts add up.

    What is masked may be anything, NaN and infinity too: it is left out, not multiplied by zero.
    """
    return jnp.where(mask, x, 0.0).sum() / (count(mask) if of is None else of)


def kl_k3(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """The k3 estimate of KL(policy ‖ reference) per token (Schulman 2020): exp(Δ) - Δ - 1, Δ = reference - policy.

    0, with no gradient, for a token that either of them rules out (-inf): it has no finite estimate.
    """
    possible = ~(jnp.isneginf(log_probs) | jnp.isneginf(reference))
    delta = jnp.where(possible, reference, 0.0) - jnp.where(possible, log_probs, 0.0)
    return jnp.exp(delta) - delta - 1.0


def policy_loss(
    log_probs: jax.Array,
    reference: jax.Array | None,
    advantage: jax.Array,
    mask: jax.Array,
    kl_coef: float,
    of: jax.Array | None = None,
) -> jax.Array:
    """On-policy GRPO loss, mean over response tokens (`masked_mean`). All per token, [...].

    One update per rollout, so the importance ratio is 1 in value and carries only the gradient. Without a `reference`
    there is no KL term. Masked tokens, and tokens of probability 0 (-inf), add nothing to the loss or its gradient.
    """
    # Chosen before the exponential: the gradient of what overflows is NaN even where its value is dropped afterwards.
    counted = mask.astype(bool) & ~jnp.isneginf(log_probs)
    log_probs = jnp.where(counted, log_probs, 0.0)
    per_token = -jnp.exp(log_probs - jax.lax.stop_gradient(log_probs)) * jnp.where(counted, advantage, 0.0)
    if reference is not None:
        per_token = per_token + kl_coef * kl_k3(log_probs, jnp.where(counted, reference, 0.0))
    return masked_mean(per_token, counted, count(mask) if of is None else of)
