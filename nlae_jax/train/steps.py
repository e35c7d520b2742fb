"""The jitted steps: encoder SFT, decoder SFT, and the RL step in its three parts.

Each step is a pure function `(state, frozen, batch) -> (state, metrics)`. `frozen` holds what no step changes: `base`
(the subject's weights; `decoder_base` where the decoder's adapters sit on others), `baselines` (FVE denominators of the
data), `tails` where the tokenizer needs them, and in RL `reference` (the warm-started encoder).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlae_jax.config import Config
from nlae_jax.lm.sampling import Samples, explanation_tokens, sample
from nlae_jax.lm.transformer import decode_weights
from nlae_jax.train import objectives
from nlae_jax.train.state import Params, RlState, Roles, RoleState

Metrics = dict[str, jax.Array]
Step = Callable[[Any, Params, Params], tuple[Any, Metrics]]


def apply_update(
    state: RoleState, gradients: Params, optimizer: optax.GradientTransformation
) -> tuple[RoleState, jax.Array, jax.Array]:
    """One optimiser step, skipped where the gradient's norm is not finite. Returns also the norm and 1 if skipped."""
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    stepped = RoleState(
        state.step + 1,
        jax.tree.map(keep, trained, state.trained),
        jax.tree.map(keep, opt_state, state.opt_state),
    )
    return stepped, norm, 1.0 - finite.astype(jnp.float32)


def encoder_sft_step(roles: Roles, optimizer: optax.GradientTransformation) -> Step:
    """Batch: `h` [B, d], `response` [B, R] int32, `length` [B]. Loss on the opening tag and the response only."""

    def loss_fn(trained: Params, frozen: Params, batch: Params) -> tuple[jax.Array, jax.Array]:
        variables = roles.encoder_variables(frozen["base"], trained)
        response, opening = roles.encoder.apply(variables, batch["h"], batch["response"], method="sft_log_probs")
        mask = jnp.arange(response.shape[1]) < batch["length"][:, None]
        loss = -objectives.masked_mean(response, mask)
        opening_loss = -opening.mean()
        weight = opening.size / (opening.size + mask.sum())
        return loss * (1 - weight) + opening_loss * weight, loss

    def step(state: RoleState, frozen: Params, batch: Params) -> tuple[RoleState, Metrics]:
        (_, loss), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.trained, frozen, batch)
        state, norm, skipped = apply_update(state, gradients, optimizer)
        tokens = batch["length"].sum()
        return state, {"loss": loss, "grad_norm_encoder": norm, "skipped_updates": skipped, "tokens": tokens}

    return step


def reconstruction_loss(
    roles: Roles, trained: Params, frozen: Params, ids: jax.Array, length: jax.Array, h: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean direction mse over the rows with an explanation (`length` > 0), and every row's mse [N]."""
    variables = roles.decoder_variables(frozen.get("decoder_base", frozen["base"]), trained)
    mse = objectives.direction_mse(roles.decoder.apply(variables, ids, length, frozen.get("tails")), h)
    return objectives.masked_mean(mse, length > 0), mse


def decoder_sft_step(roles: Roles, optimizer: optax.GradientTransformation) -> Step:
    """Batch: `h` [B, d], `ids` [B, T] explanations' tokens, `length` [B]."""

    def step(state: RoleState, frozen: Params, batch: Params) -> tuple[RoleState, Metrics]:
        def loss_fn(trained: Params) -> tuple[jax.Array, jax.Array]:
            return reconstruction_loss(roles, trained, frozen, batch["ids"], batch["length"], batch["h"])

        (loss, _), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        state, norm, skipped = apply_update(state, gradients, optimizer)
        metrics = {"loss": loss, "grad_norm_decoder": norm, "skipped_updates": skipped}
        return state, {**metrics, **_fve(loss, frozen), "tokens": batch["length"].sum()}

    return step


def _fve(mse: jax.Array, frozen: Params) -> Metrics:
    variance, mean_norm = frozen["baselines"]
    return {"fve": objectives.fve(mse, variance), "fve_meannorm": objectives.fve(mse, mean_norm)}


def rollout(
    roles: Roles,
    trained: Params,
    frozen: Params,
    h_BxD: jax.Array,
    key: jax.Array,
    *,
    samples_per_activation: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Samples:
    """Samples explanations [B, G, R]: the prompt is prefilled once per step and once per activation."""
    variables = roles.encoder_variables(frozen["base"], trained)
    protocol, encoder = roles.encoder.protocol, roles.encoder
    batch = (h_BxD.shape[0], samples_per_activation)
    with jax.named_scope("prefill"):
        logits, contexts = encoder.apply(variables, h_BxD, method="prefill")
    dtype = contexts[0][0].k.dtype
    caches = encoder.empty_caches(batch, max_new_tokens, dtype)
    weights = decode_weights(encoder, variables)

    def decode(token: jax.Array, step: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        return encoder.apply(variables, token, step, contexts, caches, weights, method="decode")

    with jax.named_scope("decode"):
        return sample(
            decode,
            jnp.broadcast_to(logits[:, None], (*batch, logits.shape[-1])),
            caches,
            key,
            max_new_tokens=max_new_tokens,
            closing=protocol.closing,
            eos_id=protocol.eos_id,
            temperature=temperature,
        )


class Scores(NamedTuple):
    """What the decoder makes of sampled explanations: `mse` [B, G], `length` [B, G], and its gradient."""

    mse: jax.Array
    length: jax.Array
    gradients: Params


def score(
    roles: Roles, trained: Params, frozen: Params, h_BxD: jax.Array, samples: Samples, blank: jax.Array
) -> Scores:
    """One pass gives every sample's mse (the reward) and the decoder's gradient (its training)."""
    shape = samples.lengths.shape
    ids, length = explanation_tokens(samples, roles.encoder.protocol.closing, blank)
    h = jnp.broadcast_to(h_BxD[:, None], (*shape, h_BxD.shape[-1])).reshape(-1, h_BxD.shape[-1])

    def loss_fn(trained: Params) -> tuple[jax.Array, jax.Array]:
        return reconstruction_loss(roles, trained, frozen, ids.reshape(-1, ids.shape[-1]), length.reshape(-1), h)

    (_, mse), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    return Scores(jnp.where(length > 0, mse.reshape(shape), objectives.FAILED_MSE), length, gradients)


class RlParts(NamedTuple):
    """The three parts of an RL step, each jittable by itself, and their composition."""

    rollout: Callable[..., Samples]
    score: Callable[..., Scores]
    update: Callable[..., tuple[RlState, Metrics]]
    step: Step


def rl_step(
    roles: Roles,
    config: Config,
    encoder_optimizer: optax.GradientTransformation,
    decoder_optimizer: optax.GradientTransformation,
) -> RlParts:
    """Batch: `h` [B, d]. Rollout, score, update of both roles; strictly on-policy, one update per rollout.

    `frozen` holds also `reference`, the encoder that the KL term compares with, and `blank` (`protocol.blank_tokens`).
    """
    rl = config.rl

    def rollout_part(state: RlState, frozen: Params, batch: Params) -> Samples:
        key = jax.random.fold_in(state.key, state.encoder.step)
        return rollout(
            roles,
            state.encoder.trained,
            frozen,
            batch["h"],
            key,
            samples_per_activation=rl.samples_per_activation,
            max_new_tokens=rl.max_new_tokens,
        )

    def score_part(state: RlState, frozen: Params, batch: Params, samples: Samples) -> Scores:
        return score(roles, state.decoder.trained, frozen, batch["h"], samples, frozen["blank"])

    def update_part(
        state: RlState, frozen: Params, batch: Params, samples: Samples, scores: Scores
    ) -> tuple[RlState, Metrics]:
        mask = jnp.arange(samples.tokens.shape[-1]) < samples.lengths[..., None]
        valid = scores.length > 0
        reward = objectives.rewards(scores.mse, valid, samples.lengths, rl.reward, rl.length_penalty)
        advantage, no_spread = objectives.group_advantages(reward)
        reference_variables = roles.encoder_variables(frozen["base"], frozen["reference"])
        with jax.named_scope("reference"):
            reference, _ = roles.encoder.apply(reference_variables, batch["h"], samples.tokens, method="log_probs")

        def loss_fn(trained: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            variables = roles.encoder_variables(frozen["base"], trained)
            log_probs, entropy = roles.encoder.apply(variables, batch["h"], samples.tokens, method="log_probs")
            return objectives.policy_loss(log_probs, reference, advantage, mask, rl.kl_coef), (log_probs, entropy)

        with jax.named_scope("policy"):
            (loss, (log_probs, entropy)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.encoder.trained)
        encoder, encoder_norm, encoder_skipped = apply_update(state.encoder, gradients, encoder_optimizer)
        decoder, decoder_norm, decoder_skipped = apply_update(state.decoder, scores.gradients, decoder_optimizer)
        metrics = {
            "loss": loss,
            **_fve(scores.mse, frozen),
            "reward_mean": reward.mean(),
            "reward_std": reward.std(),
            "kl": objectives.masked_mean(objectives.kl_k3(log_probs, reference), mask),
            "entropy": objectives.masked_mean(entropy, mask),
            "logp_gap": objectives.masked_mean(jnp.abs(log_probs - samples.log_probs), mask),
            "explanation_tokens": objectives.masked_mean(scores.length, valid),
            "extraction_rate": valid.mean(),
            "truncated_rate": (~samples.closed & (samples.lengths == samples.tokens.shape[-1])).mean(),
            "zero_variance_groups": no_spread.sum(),
            "skipped_updates": encoder_skipped + decoder_skipped,
            "grad_norm_encoder": encoder_norm,
            "grad_norm_decoder": decoder_norm,
            "tokens": samples.lengths.sum(),
        }
        return RlState(encoder, decoder, state.key), metrics

    def step(state: RlState, frozen: Params, batch: Params) -> tuple[RlState, Metrics]:
        samples = rollout_part(state, frozen, batch)
        return update_part(state, frozen, batch, samples, score_part(state, frozen, batch, samples))

    return RlParts(rollout_part, score_part, update_part, step)


class SplitStep:
    """`parts.step` as three compiled functions: less memory at once, and each can be timed by itself."""

    def __init__(self, parts: RlParts, update: Callable[..., tuple[RlState, Metrics]]) -> None:
        """`update` is `parts.update` compiled so that the new state keeps the old one's shardings (`loop.compiled`)."""
        self._rollout, self._score = jax.jit(parts.rollout), jax.jit(parts.score)
        self._update: Any = update

    def __call__(self, state: RlState, frozen: Params, batch: Params) -> tuple[RlState, Metrics]:
        samples = self._rollout(state, frozen, batch)
        return self._update(state, frozen, batch, samples, self._score(state, frozen, batch, samples))

    def _cache_size(self) -> int:
        return max(part._cache_size() for part in (self._rollout, self._score, self._update))
