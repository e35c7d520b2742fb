"""The jitted steps: encoder SFT, decoder SFT, and the RL step in its three parts.

Each step is a pure function `(state, frozen, batch) -> (state, metrics)`. `frozen` holds the arrays that no step
changes: `base` (the subject's weights), `decoder_base` where the decoder's adapters sit on other weights, `baselines`
(the data's FVE denominators), `endings` where the tokenizer needs them, `marks` where explanations are shown in part or
charged for repeats, and in RL `blank` and, with a KL term, `reference` (the warm-started encoder).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlae_jax.config import Config, RlConfig, ViewsConfig
from nlae_jax.lm.modules import apply
from nlae_jax.lm.sampling import Samples, explanation_tokens, truncated
from nlae_jax.roles import direction
from nlae_jax.roles.describer import Describer
from nlae_jax.roles.pair import Params, Roles
from nlae_jax.roles.rollout import rollout
from nlae_jax.roles.views import open_quotations, repeated_strings, repeated_words, shown
from nlae_jax.train import objectives
from nlae_jax.train.state import RlState, RoleState
from nlae_jax.train.updates import apply_update, in_microbatches

Metrics = dict[str, Any]  # scalars; under OBSERVED, arrays that the loop hands to `Stage.observe`
OBSERVED = "observed"
Step = Callable[[Any, Params, Params], tuple[Any, Metrics]]


def encoder_sft_step(roles: Roles, optimizer: optax.GradientTransformation, microbatches: int = 1) -> Step:
    """Makes the encoder's SFT step. The loss is on the opening tag and the response only.

    A batch holds `h` [B, d], `response` [B, R] int32 and its `length` [B] int32.
    """

    def step(state: RoleState, frozen: Params, batch: Params) -> tuple[RoleState, Metrics]:
        mask = jnp.arange(batch["response"].shape[1]) < batch["length"][:, None]
        trained_on = jnp.pad(mask, ((0, 0), (roles.encoder.protocol.opening_length, 0)), constant_values=True)
        count = objectives.count(trained_on)

        def loss_fn(trained: Params, part: tuple[Params, jax.Array]) -> tuple[jax.Array, jax.Array]:
            batch, mask = part
            loss_of = lambda log_probs, mask: -objectives.masked_mean(log_probs, mask, count)  # noqa: E731
            variables, inputs = roles.encoder_variables(frozen["base"], trained), (batch["h"], batch["response"])
            loss_and_log_probs: tuple[jax.Array, jax.Array] = apply(
                roles.encoder, variables, *inputs, loss_of, mask, method="sft_loss"
            )
            return loss_and_log_probs

        (_, log_probs), gradients = in_microbatches(loss_fn, state.trained, (batch, trained_on), microbatches)
        loss = -objectives.masked_mean(log_probs[:, -mask.shape[1] :], mask)
        state, norm, skipped = apply_update(state, gradients, optimizer)
        tokens = batch["length"].sum()
        return state, {"loss": loss, "grad_norm_encoder": norm, "skipped_updates": skipped, "tokens": tokens}

    return step


def describer_sft_step(describer: Describer, optimizer: optax.GradientTransformation) -> Step:
    """Makes the describer's SFT step. The loss is on notes only.

    A batch holds `prompt` [B, P] int32 with `mask` [B, P] bool, `note` [B, R] int32 and its `length` [B] int32.
    """

    def step(state: RoleState, frozen: Params, batch: Params) -> tuple[RoleState, Metrics]:
        mask = jnp.arange(batch["note"].shape[1]) < batch["length"][:, None]
        count = objectives.count(mask)

        def loss_fn(trained: Params) -> tuple[jax.Array, jax.Array]:
            variables = {"params": {"lm": frozen["base"]}, "lora": {"lm": {"blocks": trained["adapters"]}}}
            inputs = batch["prompt"], batch["mask"], batch["note"]
            loss_of = lambda log_probs, mask: -objectives.masked_mean(log_probs, mask, count)  # noqa: E731
            loss_and_log_probs: tuple[jax.Array, jax.Array] = apply(
                describer, variables, *inputs, loss_of, mask, method="loss"
            )
            return loss_and_log_probs

        (_, log_probs), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        state, norm, skipped = apply_update(state, gradients, optimizer)
        loss = -objectives.masked_mean(log_probs, mask)
        tokens = batch["length"].sum()
        return state, {"loss": loss, "grad_norm_encoder": norm, "skipped_updates": skipped, "tokens": tokens}

    return step


def reconstruction(
    roles: Roles,
    trained: Params,
    frozen: Params,
    h_BxD: jax.Array,
    ids_BxGxT: jax.Array,
    length_BxG: jax.Array,
    microbatches: int,
) -> tuple[tuple[jax.Array, tuple[jax.Array, jax.Array]], Params]:
    """Returns ((loss, (mse [B, G], reconstructions [B, G, d])), gradient).

    The loss is the mean direction mse over the explanations that are not empty (`length` > 0).
    """
    count = objectives.count(length_BxG > 0)

    def loss_fn(trained: Params, part: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h, ids, length = part
        h = jnp.broadcast_to(h[:, None], (*length.shape, h.shape[-1]))
        base: Params = frozen["decoder_base"] if "decoder_base" in frozen else frozen["base"]
        variables = roles.decoder_variables(base, trained)
        rebuilt = apply(
            roles.decoder, variables, ids.reshape(-1, ids.shape[-1]), length.reshape(-1), frozen.get("endings")
        )
        rebuilt = rebuilt.reshape(h.shape)
        mse = direction.direction_mse(rebuilt, h)
        return objectives.masked_mean(mse, length > 0, count), (mse, rebuilt)

    return in_microbatches(loss_fn, trained, (h_BxD, ids_BxGxT, length_BxG), microbatches)


def decoder_sft_step(
    roles: Roles,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    views: ViewsConfig = ViewsConfig(),
) -> Step:
    """Makes the decoder's SFT step. A batch holds `h` [B, d], explanations' token `ids` [B, T] and `length` [B]."""

    def step(state: RoleState, frozen: Params, batch: Params) -> tuple[RoleState, Metrics]:
        ids, length, whole = shown(batch["ids"][:, None], batch["length"][:, None], frozen.get("marks"), views)
        (loss, (mse, _)), gradients = reconstruction(
            roles, state.trained, frozen, batch["h"], ids, length, microbatches
        )
        state, norm, skipped = apply_update(state, gradients, optimizer)
        metrics = {"loss": loss, "grad_norm_decoder": norm, "skipped_updates": skipped}
        return state, {**metrics, **_fve(mse, whole, frozen), "tokens": batch["length"].sum()}

    return step


def _fve(mse_BxG: jax.Array, whole_B: jax.Array | None, frozen: Params) -> Metrics:
    """Computes the FVE of activations whose explanations were seen whole, and that of the others if there are any."""
    variance, mean_norm = frozen["baselines"]
    if whole_B is None:
        return {"fve": direction.fve(mse_BxG, variance), "fve_meannorm": direction.fve(mse_BxG, mean_norm)}
    whole = jnp.broadcast_to(whole_B[:, None], mse_BxG.shape)
    mse, part = objectives.masked_mean(mse_BxG, whole), objectives.masked_mean(mse_BxG, ~whole)
    fve = {"fve": direction.fve(mse, variance), "fve_meannorm": direction.fve(mse, mean_norm)}
    return {**fve, "fve_part": direction.fve(part, variance)}


class Scores(NamedTuple):
    """The decoder's results for sampled explanations. Rewards are computed from them.

    `mse` [B, G] is the direction mse, `length` [B, G] an explanation's number of tokens. `contrast` [B, G] is
    `objectives.contrast`, if it is rewarded. `whole` [B] marks activations whose explanations were seen whole, if not
    all were. `repeats` [B, G] counts repeated strings and open quotations, if they are charged for.
    """

    mse: jax.Array
    length: jax.Array
    contrast: jax.Array | None = None
    whole: jax.Array | None = None
    repeats: jax.Array | None = None


def score(
    roles: Roles, config: Config, trained: Params, frozen: Params, h_BxD: jax.Array, samples: Samples
) -> tuple[Scores, Params]:
    """Computes every sample's scores and, in the same pass, the decoder's gradient."""
    ids, written_length = explanation_tokens(samples, roles.encoder.protocol.closing, frozen["blank"])
    repeats = None
    if config.rl.repeat_penalty:
        written = ids, written_length, frozen["marks"]
        repeats = repeated_strings(*written) + repeated_words(*written) + open_quotations(*written)
    ids, length, whole = shown(ids, written_length, frozen.get("marks"), config.views)
    (_, (mse, rebuilt)), gradients = reconstruction(roles, trained, frozen, h_BxD, ids, length, config.rl.microbatches)
    mse = jnp.where(length > 0, mse, objectives.FAILED_MSE)
    contrast = objectives.contrast(rebuilt, h_BxD, length > 0) if config.rl.contrastive else None
    return Scores(mse, written_length, contrast, whole, repeats), gradients


def _rewards(rl: RlConfig, scores: Scores, valid_BxG: jax.Array, lengths_BxG: jax.Array) -> jax.Array:
    """Returns rewards [B, G] float32 of samples of these lengths. `valid` marks those with a readable explanation."""
    penalty = rl.length_penalty * lengths_BxG
    if scores.repeats is not None:
        penalty += rl.repeat_penalty * scores.repeats
    reward = objectives.rewards(scores.mse, valid_BxG, penalty, rl.reward)
    if scores.contrast is not None:
        reward = (1 - rl.contrastive) * reward + rl.contrastive * scores.contrast
    return reward


def policy_gradient(
    roles: Roles,
    rl: RlConfig,
    trained: Params,
    frozen: Params,
    h_BxD: jax.Array,
    tokens_BxGxR: jax.Array,
    advantage_BxG: jax.Array,
    mask_BxGxR: jax.Array,
) -> tuple[tuple[jax.Array, tuple[jax.Array, ...]], Params]:
    """Returns ((loss, arrays [B, G, R] float32), the encoder's gradient). The mask marks sampled tokens.

    The arrays are the tokens' log-probs and entropies and, with a KL term, the reference's log-probs.
    """
    count = objectives.count(mask_BxGxR)

    def policy_loss(
        log_probs: jax.Array, advantage: jax.Array, mask: jax.Array, reference: jax.Array | None = None
    ) -> jax.Array:
        return objectives.policy_loss(log_probs, reference, advantage, mask, rl.kl_coef, count)

    def loss_fn(trained: Params, part: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        h, tokens, advantage, mask = part
        reference: tuple[jax.Array, ...] = ()
        if rl.kl_coef:
            with jax.named_scope("reference"):
                variables = roles.encoder_variables(frozen["base"], frozen["reference"])
                reference = apply(roles.encoder, variables, h, tokens, method="log_probs")[:1]
        per_token = jnp.broadcast_to(advantage[..., None], mask.shape), mask, *reference
        with jax.named_scope("policy"):
            variables = roles.encoder_variables(frozen["base"], trained)
            loss, rows = apply(roles.encoder, variables, h, tokens, policy_loss, *per_token, method="loss")
        return loss, (*rows, *reference)

    return in_microbatches(loss_fn, trained, (h_BxD, tokens_BxGxR, advantage_BxG, mask_BxGxR), rl.microbatches)


class RlParts(NamedTuple):
    """The parts of an RL step, each jittable by itself, and their composition.

    `train_decoder` is `score` and the decoder's update; `train_encoder` adds its metrics to the decoder's.
    """

    rollout: Callable[[RlState, Params, Params], Samples]
    score: Callable[[RoleState, Params, Params, Samples], tuple[Scores, Params]]
    train_decoder: Callable[[RoleState, Params, Params, Samples], tuple[RoleState, tuple[Scores, Metrics]]]
    train_encoder: Callable[[RoleState, Params, Params, Samples, Scores, Metrics], tuple[RoleState, Metrics]]
    step: Step


def rl_step(
    roles: Roles,
    config: Config,
    encoder_optimizer: optax.GradientTransformation,
    decoder_optimizer: optax.GradientTransformation,
) -> RlParts:
    """Makes the RL step: rollout, score, update of both roles. It is strictly on-policy, with one update per rollout.

    A batch holds `h` [B, d]. `frozen` also holds `blank` (`protocol.blank_tokens`) and `reference`, the encoder that
    the KL term compares with. With `rl.kl_coef` = 0 there is no reference: none is stored or computed, and the metrics
    have no `kl`.

    The policy is the encoder at `rl.temperature`: samples, log-probs, entropy and KL are of that distribution.
    """
    rl = config.rl
    roles = roles.at_temperature(rl.temperature)

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

    def score_part(state: RoleState, frozen: Params, batch: Params, samples: Samples) -> tuple[Scores, Params]:
        return score(roles, config, state.trained, frozen, batch["h"], samples)

    def train_decoder(
        state: RoleState, frozen: Params, batch: Params, samples: Samples
    ) -> tuple[RoleState, tuple[Scores, Metrics]]:
        scores, gradients = score_part(state, frozen, batch, samples)
        state, norm, skipped = apply_update(state, gradients, decoder_optimizer)
        fve = _fve(scores.mse, scores.whole, frozen)
        return state, (scores, {**fve, "grad_norm_decoder": norm, "skipped_updates": skipped})

    def train_encoder(
        state: RoleState, frozen: Params, batch: Params, samples: Samples, scores: Scores, metrics: Metrics
    ) -> tuple[RoleState, Metrics]:
        mask = jnp.arange(samples.tokens.shape[-1]) < samples.lengths[..., None]
        valid = scores.length > 0
        reward = _rewards(rl, scores, valid, samples.lengths)
        advantage, no_spread = objectives.group_advantages(reward)
        policy_inputs = batch["h"], samples.tokens, advantage, mask
        (loss, rows), gradients = policy_gradient(roles, rl, state.trained, frozen, *policy_inputs)
        log_probs, entropy, *reference = rows
        kl = {"kl": objectives.masked_mean(objectives.kl_k3(log_probs, *reference), mask)} if reference else {}
        state, norm, skipped = apply_update(state, gradients, encoder_optimizer)
        return state, {
            **metrics,
            **kl,
            "loss": loss,
            "reward_mean": reward.mean(),
            "reward_std": reward.std(),
            **({"contrast": scores.contrast.mean()} if scores.contrast is not None else {}),
            "entropy": objectives.masked_mean(entropy, mask),
            "logp_gap": objectives.masked_mean(jnp.abs(log_probs - samples.log_probs), mask),
            "explanation_tokens": objectives.masked_mean(scores.length, valid),
            "extraction_rate": valid.mean(),
            "truncated_rate": truncated(samples, roles.encoder.protocol.eos_id).mean(),
            "zero_variance_groups": no_spread.sum(),
            "skipped_updates": metrics["skipped_updates"] + skipped,
            "grad_norm_encoder": norm,
            "tokens": samples.lengths.sum(),
            # Whether all explanations became one text, or repeat themselves, can only be seen from the tokens. They
            # take 4 bytes each and are fetched while the next step computes.
            OBSERVED: {"tokens": samples.tokens, "lengths": samples.lengths},
        }

    def step(state: RlState, frozen: Params, batch: Params) -> tuple[RlState, Metrics]:
        samples = rollout_part(state, frozen, batch)
        decoder, (scores, metrics) = train_decoder(state.decoder, frozen, batch, samples)
        encoder, metrics = train_encoder(state.encoder, frozen, batch, samples, scores, metrics)
        return RlState(encoder, decoder, state.key), metrics

    return RlParts(rollout_part, score_part, train_decoder, train_encoder, step)


class SplitStep:
    """Runs `parts.step` as three compiled functions. It needs less memory at once, and each part can be timed.

    The decoder is updated before the encoder's gradient is begun, so the two gradients never take memory together.
    """

    def __init__(self, parts: RlParts, train_decoder: Any, train_encoder: Any) -> None:
        """Takes the functions of `parts` compiled so that a new state takes the old one's memory (`loop.compiled`)."""
        self.parts: tuple[Any, Any, Any] = jax.jit(parts.rollout), train_decoder, train_encoder

    def __call__(self, state: RlState, frozen: Params, batch: Params) -> tuple[RlState, Metrics]:
        rollout, train_decoder, train_encoder = self.parts
        samples = rollout(state, frozen, batch)
        decoder, (scores, metrics) = train_decoder(state.decoder, frozen, batch, samples)
        encoder, metrics = train_encoder(state.encoder, frozen, batch, samples, scores, metrics)
        return RlState(encoder, decoder, state.key), metrics

    def lower(self, state: RlState, frozen: Params, batch: Params) -> Any:
        """Lowers the first part only, because the others read its results."""
        return self.parts[0].lower(state, frozen, batch)

    def _cache_size(self) -> int:
        return max(int(part._cache_size()) for part in self.parts)
