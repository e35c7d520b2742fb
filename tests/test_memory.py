"""What the compiled RL step takes beside its arguments: activations and gradients, never another copy of the weights.

On a model whose weights are much larger than its activations. Programs are compiled from shapes alone and not run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.config import MeshConfig
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.mesh import batch_sharding, make_mesh, replicated
from nlae_jax.roles import direction
from nlae_jax.roles.pair import Roles, make_roles
from nlae_jax.train.loop import compiled
from nlae_jax.train.state import RlState, abstract_params, abstract_role, make_optimizer
from nlae_jax.train.steps import rl_step
from tests.conftest import tiny_config

ARCH = Arch(
    vocab_size=512, d_model=128, num_layers=8, num_heads=2, num_kv_heads=2, head_dim=64, d_ff=1024, tied_head=True
)
ACTIVATIONS = 2


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Compiled:
    """A fused or split RL step for some config, from shapes alone."""

    def __init__(self, protocol, roles_class=Roles, **overrides):
        config = tiny_config(
            remat="none",
            subject__layer=5,
            rl__activations_per_step=ACTIVATIONS,
            rl__max_new_tokens=8,
            lora__alpha=2.0,
            **overrides,
        )
        self.mesh = make_mesh(MeshConfig())
        roles = make_roles(config, ARCH, dataclasses.replace(protocol, closing=protocol.closing[:1]))
        self.roles = roles_class(**{f.name: getattr(roles, f.name) for f in dataclasses.fields(roles)})
        self.optimizer = make_optimizer(config, 1e-3)
        self.parts = rl_step(self.roles, config, self.optimizer, self.optimizer)
        self.state = RlState(
            abstract_role(self.mesh, self.roles.encoder_weights(), self.optimizer),
            abstract_role(self.mesh, self.roles.decoder_weights(), self.optimizer),
            self._abstract(np.zeros(2, np.uint32)),
        )
        dtype, lora = config.subject.dtype, config.lora.rank > 0
        base = self._params(model_weights(ARCH), dtype) if lora else {}
        self.frozen = {
            "base": base,
            "baselines": direction.Baselines(*[self._abstract(np.float32(1))] * 2),
            "blank": self._abstract(np.zeros(ARCH.vocab_size, bool)),
        }
        if config.rl.kl_coef:
            reference = self.state.encoder.trained if lora else self._params(self.roles.encoder_weights(), dtype)
            self.frozen["reference"] = reference
        h = jax.ShapeDtypeStruct((ACTIVATIONS, ARCH.d_model), jnp.float32, sharding=batch_sharding(self.mesh))
        self.batch = {"h": h}

    def _abstract(self, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(self.mesh))

    def _params(self, weights, dtype="float32"):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), abstract_params(self.mesh, weights)
        )

    def fused(self):
        """The whole step's memory."""
        step = compiled(self.parts.step, self.state, self.mesh)
        return step.lower(self.state, self.frozen, self.batch).compile().memory_analysis()

    def trained(self):
        """Memory of the decoder's training and of the encoder's, each a program of its own."""
        given = self.frozen, self.batch
        samples = jax.tree.map(self._abstract, jax.eval_shape(self.parts.rollout, self.state, *given))
        scored = jax.eval_shape(self.parts.train_decoder, self.state.decoder, *given, samples)[1]
        scored = jax.tree.map(self._abstract, scored)
        decoder = compiled(self.parts.train_decoder, self.state.decoder, self.mesh)
        encoder = compiled(self.parts.train_encoder, self.state.encoder, self.mesh)
        lowered = (
            decoder.lower(self.state.decoder, *given, samples),
            encoder.lower(self.state.encoder, *given, samples, *scored),
        )
        return [program.compile().memory_analysis() for program in lowered]


class CopyingRoles(Roles):
    """What must not happen: every use of the base makes a copy of it."""

    def encoder_variables(self, base, trained):
        return super().encoder_variables(jax.tree.map(lambda w: w * 1.0001, base), trained)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_adapters_copies_no_base(protocol, microbatches):
    step = Compiled(protocol, lora__rank=2, rl__microbatches=microbatches)
    base = num_bytes(step.frozen["base"])
    for memory, state in zip(step.trained(), (step.state.decoder, step.state.encoder), strict=True):
        assert memory.alias_size_in_bytes >= num_bytes(state)  # the new state takes the old one's place
        held = base + num_bytes(state) + num_bytes(step.frozen["reference"])
        assert memory.argument_size_in_bytes <= held + 20_000
        assert memory.temp_size_in_bytes < 0.5 * base


@pytest.mark.slow
def test_a_copy_of_the_base_would_be_noticed(protocol):
    step = Compiled(protocol, CopyingRoles, lora__rank=2)
    assert min(memory.temp_size_in_bytes for memory in step.trained()) > 0.8 * num_bytes(step.frozen["base"])


def test_the_fused_step_shares_one_base(protocol):
    """Of subject, encoder, decoder and reference. Decoding may hold the blocks once more, apart from one another."""
    step = Compiled(protocol, lora__rank=2)
    memory, base = step.fused(), num_bytes(step.frozen["base"])
    held = base + num_bytes(step.state) + num_bytes(step.frozen["reference"])
    assert memory.alias_size_in_bytes >= num_bytes(step.state)
    assert memory.argument_size_in_bytes <= held + 20_000
    assert memory.temp_size_in_bytes < 1.3 * base


def test_full_fine_tuning_takes_weights_moments_and_gradients(protocol):
    """Beside masters and two moments (and the reference) a gradient, and what clipping makes of it."""
    step = Compiled(protocol, lora__rank=0)
    for memory, state, copies in zip(step.trained(), (step.state.decoder, step.state.encoder), (3, 3 + 1), strict=True):
        params = num_bytes(state.trained)
        assert memory.alias_size_in_bytes >= num_bytes(state)
        assert memory.argument_size_in_bytes <= copies * params + 20_000
        assert memory.temp_size_in_bytes < 2.9 * params


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_reference_takes_memory_only_where_there_is_a_kl_term(protocol, kl_coef):
    step = Compiled(protocol, lora__rank=0, rl__kl_coef=kl_coef)
    params = num_bytes(step.state.encoder.trained)
    _, encoder = step.trained()
    held = encoder.argument_size_in_bytes / params
    assert abs(held - (3 + (kl_coef > 0))) < 0.05  # masters and two moments
