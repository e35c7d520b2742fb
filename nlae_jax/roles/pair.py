"""Encoder and decoder together: the two modules, their parameters, and the variables that each module reads."""

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
from nlae_jax.runtime.errors import UserError

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Roles:
    """The two modules, and how their variables are put together from frozen and trained parameters.

    With LoRA (`rank` > 0), a role trains its adapters, and the decoder also its head. The adapters sit on the frozen
    `base`, which both roles share unless they start from a released pair. Without LoRA (`rank` 0), a role trains a full
    copy of the base's weights, and `base` is not read. The copy computes in `dtype` (None: in its own dtype), and its
    gradient is float32. `experts` says whether the experts have adapters too.
    """

    encoder: Encoder
    decoder: Decoder
    rank: int
    dtype: str | None = None
    experts: bool = False

    def encoder_variables(self, base: Params, trained: Params) -> Params:
        """Builds the encoder module's variables."""
        if self.rank == 0:
            return {"params": {"lm": optax.tree.cast(trained["lm"], self.dtype)}}
        return {"params": {"lm": base}, "lora": {"lm": {"blocks": trained["adapters"]}}}

    def decoder_variables(self, base: Params, trained: Params) -> Params:
        """Builds the decoder module's variables."""
        variables = self.encoder_variables(base, trained)
        variables["params"]["value_head"] = trained["value_head"]
        return variables

    def reference(self, trained: Params) -> Params:
        """Copies an encoder's trained parameters for the KL reference, in the dtype that the encoder computes in.

        `encoder_variables` gives equal variables for the copy and the original.
        """
        if self.rank:
            copy: Params = jax.tree.map(jnp.copy, trained)
            return copy
        return {"lm": jax.tree.map(lambda w: jnp.array(w, self.dtype, copy=True), trained["lm"])}

    def with_whole_prompts(self) -> Roles:
        """Returns the roles with a decoder that adds no prompt, for inputs that are whole prompts."""
        bare = dataclasses.replace(self.decoder.protocol, decoder_prefix=(), decoder_suffix=())
        return dataclasses.replace(self, decoder=self.decoder.clone(protocol=bare))

    def at_temperature(self, temperature: float) -> Roles:
        """Returns the roles with an encoder that divides its logits by `temperature`."""
        arch = self.encoder.arch.tempered(temperature)
        return dataclasses.replace(self, encoder=self.encoder.clone(arch=arch))

    def encoder_weights(self) -> Params:
        """Declares the encoder's trained parameters: their shapes and logical axes."""
        arch = self.encoder.arch
        if self.rank == 0:
            return {"lm": model_weights(arch)}
        return {"adapters": adapter_weights(arch, self.rank, self.experts)}

    def decoder_weights(self) -> Params:
        """Declares the decoder's trained parameters: their shapes and logical axes."""
        arch = self.decoder.arch.truncated(self.decoder.layer + 1)
        head = Weight((arch.d_model, arch.d_model), ("norm", "embed"))
        if self.rank == 0:
            return {"lm": decoder_model_weights(arch), "value_head": head}
        return {"adapters": adapter_weights(arch, self.rank, self.experts), "value_head": head}


class Pair(NamedTuple):
    """The parameters of an encoder and a decoder.

    `base` is the frozen model that the adapters sit on (`{}` without LoRA). `decoder_base` is set only where the
    decoder's adapters sit on another model.
    """

    base: Params
    encoder: Params
    decoder: Params
    decoder_base: Params | None = None

    def decoder_variables(self, roles: Roles) -> Params:
        """Builds the decoder module's variables on the model that its adapters sit on."""
        base = self.base if self.decoder_base is None else self.decoder_base
        return roles.decoder_variables(base, self.decoder)


def parameter_sums(params: Any) -> list[float]:
    """Returns the sum of each array's absolute values, computed in float32.

    The sums identify parameters by their values, not by their files.
    """
    return [float(jnp.sum(jnp.abs(leaf), dtype=jnp.float32)) for leaf in jax.tree.leaves(params)]


def decoder_model_weights(arch: Arch) -> Params:
    """Declares the weights of a fine-tuned decoder's language model.

    It has no LM head. The final norm stays, so that the tree has a language model's form.
    """
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
    """Builds both modules for a run.

    `arch` is the subject's. `encoder_arch` and `decoder_arch` replace it for a role that starts from another model.
    Raises UserError where `lora.experts` asks for adapters on experts that a model does not have.
    """
    for model in (encoder_arch or arch, decoder_arch or arch):
        check_experts(config, model)
    scale = config.lora.alpha / config.lora.rank if config.lora.rank else 1.0
    layer = config.subject.layer
    if decoder_arch is None:
        depth = layer + 1 if config.lora.rank == 0 else arch.num_layers
        # A decoder never reads the LM head. Declared as tied, its full copy of the weights carries none.
        decoder_arch = dataclasses.replace(arch.truncated(depth), tied_head=arch.tied_head or config.lora.rank == 0)
    return Roles(
        encoder=Encoder(encoder_arch or arch, protocol, scale, config.remat, config.attention),
        decoder=Decoder(decoder_arch, layer, protocol, scale, config.remat, config.attention),
        rank=config.lora.rank,
        dtype=config.subject.dtype,
        experts=bool(config.lora.rank and config.lora.experts),
    )


def check_experts(config: Config, arch: Arch) -> None:
    """Raises UserError where `lora.experts` asks for adapters on experts that the model does not have."""
    if config.lora.experts and arch.experts is None:
        raise UserError(f"config.lora.experts: the model ({arch.family}) has no experts; it should be False")
