"""A mixture of experts: every token passes the few MLPs that a router chooses for it (Shazeer et al. 2017).

Tokens are sorted by expert, so that one ragged product per matrix does all experts' work and no more: as many rows as
tokens have experts, whatever their shares. Nothing is dropped, and no expert has a capacity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch, Experts
from nlae_jax.lm.mlp import activated
from nlae_jax.lm.norms import norm, rms_norm
from nlae_jax.lm.products import einsum, precision_of


def route(experts: Experts, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Router logits [N, experts] float32 -> the chosen experts and their weights, each [N, per_token]."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts.per_token)
    return chosen, weights / weights.sum(-1, keepdims=True) if experts.normalised else weights


def router_logits(arch: Arch, weights: dict[str, jax.Array], x_NxD: jax.Array) -> jax.Array:
    """[N, d] -> [N, experts], in float32 whatever the model does: which are chosen hangs on small differences.

    What a router's own norm gives is divided by √d.
    """
    x_NxD = x_NxD.astype(jnp.float32)
    if "router_norm" in weights:
        x_NxD = rms_norm(x_NxD, weights["router_norm"], arch.norm_eps) * arch.d_model**-0.5
    logits = einsum("nd,de->ne", x_NxD, weights["router"].astype(jnp.float32))
    return logits + weights["router_bias"].astype(jnp.float32) if "router" in arch.biases else logits


def mixture(arch: Arch, experts: Experts, weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """[..., d] -> [..., d]: the chosen experts' outputs, summed by the router's weights.

    x is what the MLP reads, or the residual stream where router and experts have norms of their own.
    """
    flat_NxD = x.reshape(-1, x.shape[-1])
    chosen, shares = route(experts, router_logits(arch, weights, flat_NxD))
    if experts.apart:
        shares = shares * weights["expert_scale"].astype(jnp.float32)[chosen]
        flat_NxD = norm(arch, flat_NxD, weights["experts_norm"], None)

    order = jnp.argsort(chosen.reshape(-1))  # of a token's choices, expert by expert
    expert, token = chosen.reshape(-1)[order], order // experts.per_token
    sizes = jnp.bincount(expert, length=experts.count).astype(jnp.int32)

    def product(rows: jax.Array, name: str) -> jax.Array:
        matrices = weights[name]
        out = jax.lax.ragged_dot(rows, matrices, sizes, precision=precision_of(rows, matrices))
        return out + weights[f"{name}_bias"][expert] if name in arch.biases else out

    rows = flat_NxD[token]
    rows = product(activated(arch, lambda name: product(rows, name)), "down")
    rows = rows * shares.reshape(-1)[order][:, None].astype(rows.dtype)
    summed = rows[jnp.argsort(order)].reshape(*chosen.shape, -1).sum(1)
    return summed.astype(x.dtype).reshape(x.shape)
