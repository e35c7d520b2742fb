"""A mixture of experts: every token passes the few MLPs that a router chooses for it (Shazeer et al. 2017).

Tokens are sorted by expert, so that one ragged product per matrix does all experts' work and no more: as many rows as
tokens have experts, whatever their shares. Nothing is dropped, and no expert has a capacity.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from nlae_jax.lm.arch import Arch, Experts, block_weights
from nlae_jax.lm.mlp import activated
from nlae_jax.lm.norms import norm, rms_norm
from nlae_jax.lm.products import einsum, precision_of
from nlae_jax.mesh import DECODE_RULES, RULES, split

# Weights of a mixture that every device has whole.
_EVERYWHERE = ("router", "router_bias", "router_norm", "expert_scale", "experts_norm")


def route(experts: Experts, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the experts that router logits [N, experts] float32 choose, and their weights, each [N, per_token]."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts.per_token)
    return chosen, weights / weights.sum(-1, keepdims=True) if experts.normalised else weights


def router_logits(arch: Arch, weights: dict[str, jax.Array], x_NxD: jax.Array) -> jax.Array:
    """Returns the router's logits [N, experts] in float32.

    The router computes in float32, whatever the model does: which experts it chooses hangs on small differences. A
    router with a norm of its own divides the norm's output by √d.
    """
    x_NxD = x_NxD.astype(jnp.float32)
    if "router_norm" in weights:
        x_NxD = rms_norm(x_NxD, weights["router_norm"], arch.norm_eps) * arch.d_model**-0.5
    logits = einsum("nd,de->ne", x_NxD, weights["router"].astype(jnp.float32))
    return logits + weights["router_bias"].astype(jnp.float32) if "router" in arch.biases else logits


def mixture(
    arch: Arch,
    experts: Experts,
    weights: dict[str, jax.Array],
    adapters: dict[str, Any],
    scale: float,
    x: jax.Array,
    decoding: bool = False,
) -> jax.Array:
    """Returns the sum of the chosen experts' outputs, weighted by the router: [*batch, T, d] -> [*batch, T, d].

    x is the MLP's input, or the residual stream if router and experts have norms of their own. Those of the block's
    `adapters` that the experts have are applied, times `scale`.

    On a mesh each device computes its rows with its experts, and the results are summed. Left to itself, XLA sorts and
    multiplies all rows on every device.
    """
    by_expert = [name for name, weight in block_weights(arch).items() if "experts" in weight.axes]
    mixture_weights = {name: weights[name] for name in (*by_expert, *_EVERYWHERE) if name in weights}
    expert_adapters = {name: adapters[name] for name in by_expert if name in adapters}
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1:
        return _of_device(arch, experts, scale, None, mixture_weights, expert_adapters, x)
    rules, rows = (DECODE_RULES, "rows") if decoding else (RULES, "batch")
    among = split(mesh, "experts", experts.count, rules)
    stacked = {name: PartitionSpec(among if name in by_expert else None) for name in mixture_weights}
    by_rows = PartitionSpec(split(mesh, rows, x.shape[0], rules) if x.ndim > 2 else None)
    local = functools.partial(_of_device, arch, experts, scale, among)
    in_specs = stacked, PartitionSpec(among), by_rows
    split_up = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=by_rows, check_vma=False)
    mixed: jax.Array = split_up(mixture_weights, expert_adapters, x)
    return mixed


def _of_device(
    arch: Arch,
    experts: Experts,
    scale: float,
    among: str | tuple[str, ...] | None,
    weights: dict[str, jax.Array],
    adapters: dict[str, dict[str, jax.Array]],
    x: jax.Array,
) -> jax.Array:
    """Computes `mixture` on one device. The mesh axes `among` split the experts into equal shares."""
    flat_NxD = x.reshape(-1, x.shape[-1])
    chosen, shares = route(experts, router_logits(arch, weights, flat_NxD))
    if experts.apart:
        shares = shares * weights["expert_scale"].astype(jnp.float32)[chosen]
        flat_NxD = norm(arch, flat_NxD, weights["experts_norm"], None)

    device_experts = weights["up"].shape[0]
    first = jax.lax.axis_index(among) * device_experts if among else 0
    numbers = ((chosen - first) % experts.count).reshape(-1)  # the device's experts come first
    order = jnp.argsort(numbers)  # of a token's choices, expert by expert
    expert, token = numbers[order], order // experts.per_token
    sizes = jnp.bincount(expert, length=experts.count)[:device_experts].astype(jnp.int32)
    # Rows after the last group are undefined in a ragged product and in its gradient.
    is_local = (expert < device_experts)[:, None]
    only_local = lambda rows: jnp.where(is_local, rows, 0) if among else rows  # noqa: E731

    def ragged(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrices, sizes, precision=precision_of(rows, matrices))

    def product(rows: jax.Array, name: str, share: jax.Array | float = 1.0) -> jax.Array:
        out = ragged(rows, weights[name])
        if name in adapters:
            a, b = (adapters[name][part].astype(rows.dtype) for part in ("a", "b"))
            inner = only_local(ragged(rows, a.swapaxes(1, 2)))
            out = out + ragged(inner, b) * jnp.asarray(scale, rows.dtype)
        if name in arch.biases:
            out = out + weights[f"{name}_bias"][jnp.minimum(expert, device_experts - 1)] * share
        return checkpoint_name(only_local(out), name)  # for the gradient of each bias, too

    rows = only_local(flat_NxD[token])
    share = shares.reshape(-1)[order][:, None].astype(rows.dtype)
    # Scaled before the last product: the gradient of the shares would otherwise need that product's output again.
    scaled = only_local(activated(arch, lambda name: product(rows, name)) * share)
    rows = product(scaled, "down", share)
    summed = rows[jnp.argsort(order)].reshape(*chosen.shape, -1).sum(1)
    summed = jax.lax.psum(summed, among) if among else summed
    return summed.astype(x.dtype).reshape(x.shape)
