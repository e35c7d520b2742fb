"""Encoder and decoder together: the two modules, their parameters, and what each of them reads."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlae_jax.config import Config
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.lora import adapter_weights
from nlae_jax.mesh import Weight
from nlae_jax.roles.decoder import Decoder
from nlae_jax.roles.encoder import Encoder
from nlae_jax.roles.protocol import Protocol

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Roles:
    """The two modules and how their parameters are put together.

    With LoRA a role's trained parameters are its adapters (and the decoder's head) beside the frozen `base`, which both
    share unless they start from a released pair; without, they are a full copy of its weights and `base` is not read.
    That copy computes in `dtype` (None: in its own) and its gradient is float32 again.
    """

    encoder: Encoder
    decoder: Decoder
    rank: int
    dtype: str | None = None

    def encoder_variables(self, base: Params, trained: Params) -> Params:
        if self.rank == 0:
            return {"params": {"lm": optax.tree.cast(trained["lm"], self.dtype)}}
        return {"params": {"lm": base}, "lora": {"lm": {"blocks": trained["adapters"]}}}

    def decoder_variables(self, base: Params, trained: Params) -> Params:
        variables = self.encoder_variables(base, trained)
        variables["params"]["value_head"] = trained["value_head"]
        return variables

    def reference(self, trained: Params) -> Params:
        """A copy of an encoder's parameters that is only computed with: `encoder_variables` makes the same of both."""
        if self.rank:
            copy: Params = jax.tree.map(jnp.copy, trained)
            return copy
        return {"lm": jax.tree.map(lambda w: jnp.array(w, self.dtype, copy=True), trained["lm"])}

    def with_whole_prompts(self) -> Roles:
        """The same for explanations that come with the decoder's prompt around them."""
        bare = dataclasses.replace(self.decoder.protocol, decoder_prefix=(), decoder_suffix=())
        return dataclasses.replace(self, decoder=self.decoder.clone(protocol=bare))

    def encoder_weights(self) -> Params:
        """The trained parameters' declarations."""
        arch = self.encoder.arch
        return {"lm": model_weights(arch)} if self.rank == 0 else {"adapters": adapter_weights(arch, self.rank)}

    def decoder_weights(self) -> Params:
        arch = self.decoder.arch.truncated(self.decoder.layer + 1)
        head = Weight((arch.d_model, arch.d_model), ("norm", "embed"))
        if self.rank == 0:
            return {"lm": decoder_model_weights(arch), "value_head": head}
        return {"adapters": adapter_weights(arch, self.rank), "value_head": head}


class Pair(NamedTuple):
    """Parameters of an encoder and a decoder; `base` is the frozen model that adapters sit on (`{}` without LoRA).

    `decoder_base` is there only where the decoder's adapters sit on another.
    """

    base: Params
    encoder: Params
    decoder: Params
    decoder_base: Params | None = None

    def decoder_variables(self, roles: Roles) -> Params:
        base = self.base if self.decoder_base is None else self.decoder_base
        return roles.decoder_variables(base, self.decoder)


def parameter_sums(params: Any) -> list[float]:
    """The sum of each array's absolute values, float32: tells parameters from others, whatever files they are in."""
    return [float(jnp.sum(jnp.abs(leaf), dtype=jnp.float32)) for leaf in jax.tree.leaves(params)]


def decoder_model_weights(arch: Arch) -> Params:
    """A fine-tuned decoder's own weights. It has no LM head; the final norm is kept so that the tree is a model's."""
    weights = model_weights(arch)
    weights.pop("head", None)
    return weights


def make_roles(
    config: Config,
    arch: Arch,
    protocol: Protocol,
    encoder_arch: Arch | None = None,
    decoder_arch: Arch | None = None,
) -> Roles:
    """`arch` is the subject's; a role that starts from a model of its own has another."""
    scale = config.lora.alpha / config.lora.rank if config.lora.rank else 1.0
    layer = config.subject.layer
    if decoder_arch is None:
        depth = layer + 1 if config.lora.rank == 0 else arch.num_layers
        # A decoder never reads the head, so a copy of its own is declared tied and carries none.
        decoder_arch = dataclasses.replace(arch.truncated(depth), tied_head=arch.tied_head or config.lora.rank == 0)
    return Roles(
        encoder=Encoder(encoder_arch or arch, protocol, scale, config.remat, config.attention),
        decoder=Decoder(decoder_arch, layer, protocol, scale, config.remat, config.attention),
        rank=config.lora.rank,
        dtype=config.subject.dtype,
    )
