"""The maths of training: rewards, advantages, the policy objective. All functions are pure and compute in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nlae_jax.lm.products import einsum
from nlae_jax.roles.direction import unit_direction

# The mse counted for a sample whose explanation could not be read: that of an orthogonal reconstruction.
FAILED_MSE = 2.0


REWARDS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "neg_mse": lambda mse: -mse,
    "neg_log_mse": lambda mse: -jnp.log(mse + 1e-6),
}


def rewards(mse: jax.Array, valid: jax.Array, penalty: jax.Array, kind: str) -> jax.Array:
    """Returns each sample's reward, [...] float32: R(mse) of the `REWARDS` entry `kind`, less its `penalty` (>= 0).

    A readable sample (`valid`) earns max(R(mse) - penalty, -2). An unreadable one earns -2 - penalty and is trained on.
    So no unreadable sample ever earns more than a readable one, whatever the kind, the mse (up to 4) and the penalties.
    Otherwise RL would learn not to close its tags where reconstructions are poor.
    """
    return jnp.where(valid, jnp.maximum(REWARDS[kind](mse) - penalty, -FAILED_MSE), -FAILED_MSE - penalty)


# The contrastive reward's temperature, in units of mse: about the spread of the mse over activations of similar text.
CONTRAST_TEMPERATURE = 0.1


def contrast(reconstruction_BxGxD: jax.Array, h_BxD: jax.Array, valid_BxG: jax.Array) -> jax.Array:
    """Scores how well each reconstruction picks its activation among the batch's: [B, G] float32 in [-2 log B, 0].

    It is InfoNCE (van den Oord et al. 2018): the log softmax over the batch of -mse / temperature, at the activation
    that was explained. Chance gives -log B. Twice that is the lower bound, and the score of a failed extraction.
    """
    rebuilt_BxGxD, true_BxD = unit_direction(reconstruction_BxGxD), unit_direction(h_BxD)
    mse_BxGxB = 2.0 - 2.0 * einsum("bgd,cd->bgc", rebuilt_BxGxD, true_BxD) / h_BxD.shape[-1]
    log_probability_BxGxB = jax.nn.log_softmax(-mse_BxGxB / CONTRAST_TEMPERATURE, axis=-1)
    score = jnp.einsum("bgb->bg", log_probability_BxGxB)
    least = -2.0 * jnp.log(jnp.float32(max(h_BxD.shape[0], 2)))
    return jnp.where(valid_BxG, jnp.maximum(score, least), least)


def group_advantages(reward_BxG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the advantages of GRPO (Shao et al. 2024), (r - group mean) / (group std + eps): [B, G] float32.

    The second result [B] bool marks groups without any spread. Their advantages are zero.
    """
    std = reward_BxG.std(-1, keepdims=True)
    advantage = (reward_BxG - reward_BxG.mean(-1, keepdims=True)) / (std + 1e-6)
    # Decided by the range and set to zero: rounding may give equal rewards a deviation from their mean and a standard
    # deviation that are not quite zero, and the ratio of the two would be a signal out of nothing.
    no_spread = reward_BxG.max(-1) - reward_BxG.min(-1) < 1e-6
    return jnp.where(no_spread[:, None], 0.0, advantage), no_spread


def count(mask: jax.Array) -> jax.Array:
    """Returns the number of True entries, at least 1, as float32 []: the divisor of a masked mean."""
    return jnp.maximum(mask.astype(jnp.float32).sum(), 1.0)


def masked_mean(x: jax.Array, mask: jax.Array, total: jax.Array | None = None) -> jax.Array:
    """Returns the mean of x over the entries where `mask` is True, float32 []; 0 where no entry is.

    `total` replaces the divisor, which is `count(mask)`. A part of a batch gives the whole batch's count as `total`, so
    that the parts' means add up. Masked entries may be NaN or infinite: they are left out, not multiplied by zero.
    """
    return jnp.where(mask, x, 0.0).sum() / (count(mask) if total is None else total)


def kl_k3(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the k3 estimate (Schulman 2020) of KL(policy ‖ reference) per token, in nats, [...] float32.

    It is exp(Δ) - Δ - 1 with Δ = log p of the reference - log p of the policy. A token that one of the two rules out
    (-inf) has no finite estimate: it gives 0 and no gradient.
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
    total: jax.Array | None = None,
) -> jax.Array:
    """Returns the on-policy GRPO loss (Shao et al. 2024), float32 []: a `masked_mean` over response tokens.

    All arrays are per token, [...]; `total` as in `masked_mean`. There is one update per rollout, so the importance
    ratio is 1 in value and carries only the gradient. Without a `reference` there is no KL term. Masked tokens, and
    tokens of probability 0 (-inf), add nothing to the loss or its gradient.
    """
    # Selected before the exponential: where exp overflows its gradient is NaN, even if the value is dropped afterwards.
    counted = mask.astype(bool) & ~jnp.isneginf(log_probs)
    log_probs = jnp.where(counted, log_probs, 0.0)
    per_token = -jnp.exp(log_probs - jax.lax.stop_gradient(log_probs)) * jnp.where(counted, advantage, 0.0)
    if reference is not None:
        per_token = per_token + kl_coef * kl_k3(log_probs, jnp.where(counted, reference, 0.0))
    return masked_mean(per_token, counted, count(mask) if total is None else total)
