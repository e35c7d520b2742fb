"""MLP neurons: their directions in the residual stream, their activations, and the choice of neurons to examine."""

from __future__ import annotations

import re

import numpy as np

from nlae_jax.explore.corpus import Corpus, neuron_values
from nlae_jax.explore.directions import DirectionReport, DirectionSettings, cosine, explain_direction
from nlae_jax.explore.explainer import Explainer
from nlae_jax.lm.arch import Arch
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

_SPEC = re.compile(r"(\d{1,6}):(\d{1,9})")


def check_layer(arch: Arch, layer: int) -> int:
    """Returns the block's number if its neurons can be read.

    Raises UserError where the block does not exist, or its MLP has experts or no gate.
    """
    if arch.experts is not None or not arch.gated:
        raise UserError(f"neuron: those of {arch.family} cannot be read: its blocks have experts, or no gate")
    if not 0 <= layer < arch.num_layers:
        raise UserError(f"neuron: block {layer} should be from 0 to {arch.num_layers - 1}")
    return layer


def parse_neuron(spec: str, arch: Arch) -> tuple[int, int]:
    """Parses `L:I`, block and neuron counted from 0. Raises UserError where that neuron does not exist."""
    match = _SPEC.fullmatch(spec.strip()) if isinstance(spec, str) else None
    if match is None:
        raise UserError(f"neuron: {quoted(spec)} should be BLOCK:NEURON, as 20:7")
    layer, index = check_layer(arch, int(match[1])), int(match[2])
    if index >= arch.d_ff:
        raise UserError(f"neuron: {index} should be from 0 to {arch.d_ff - 1}, the neurons of a block")
    return layer, index


def neuron_directions(nla: Explainer, layer: int, index: int) -> dict[str, np.ndarray]:
    """Returns a neuron's vectors in the residual stream, [d] float32 each.

    `write` is the vector that the neuron adds per unit of its activation, scaled by the norm after the MLP if there is
    one. `gate` and `up` are the directions that the neuron's two inputs read, scaled by the norm before the MLP. Raises
    UserError for an adapted pair.
    """
    nla.check_own_subject("neuron")
    subject = nla.subject
    blocks, arch = subject.params["blocks"], subject.arch

    def norm(name: str) -> np.ndarray:
        weight = blocks.get(name)
        offset = np.float32(arch.norm_offset)
        return np.ones(1, np.float32) if weight is None else np.asarray(np.float32(weight[layer]) + offset)

    return {
        "write": np.asarray(blocks["down"][layer, index], np.float32) * norm("mlp_post_norm"),
        "gate": np.asarray(blocks["gate"][layer, :, index], np.float32) * norm("mlp_norm"),
        "up": np.asarray(blocks["up"][layer, :, index], np.float32) * norm("mlp_norm"),
    }


def explain_neuron(
    nla: Explainer,
    layer: int,
    index: int,
    corpus: Corpus,
    settings: DirectionSettings | None = None,
    values_N: np.ndarray | None = None,
    side: str = "write",
) -> DirectionReport:
    """Explains one of a neuron's directions: the output ("write"), or the direction that the input `side` reads.

    `side` is "write", "gate" or "up". `values_N` are the neuron's activations on the corpus, which are computed if they
    are not given. Raises UserError for another `side`.
    """
    vectors = neuron_directions(nla, layer, index)
    if side not in vectors:
        raise UserError(f"side: {quoted(side)} should be write, gate or up")
    if values_N is None:
        values_N = np.concatenate(neuron_values(nla, corpus, layer, lambda values: values[:, index]))
    notes = [f"cosine of what it reads (gate) and writes: {float(cosine(vectors['gate'], vectors['write'])):.3f}"]
    if layer > nla.layer:
        notes.append(f"block {layer} lies above block {nla.layer}, which the pair reads: its activations lack it")
    name = f"neuron {layer}:{index}" + ("" if side == "write" else f" ({side})")
    return explain_direction(nla, name, vectors[side], corpus, settings, values_N, notes)


def choose_neurons(nla: Explainer, corpus: Corpus, layer: int, count: int, drawn: bool, seed: int) -> list[int]:
    """Chooses `count` neurons of a block: at random (`drawn`), or with the largest maximum / root mean square."""
    d_ff = nla.subject.arch.d_ff
    if count < 1:
        raise UserError(f"--top: {count} should be at least 1")
    if drawn:
        return sorted(np.random.default_rng(seed).permutation(d_ff)[:count].tolist())
    statistics = neuron_values(nla, corpus, layer, lambda values: (values.max(0), np.square(values).sum(0)))
    peak = np.max([maximum for maximum, _ in statistics], axis=0)
    square = np.sum([squares for _, squares in statistics], axis=0) / len(corpus.h_NxD)
    return np.argsort(-peak / np.maximum(np.sqrt(square), 1e-30), kind="stable")[:count].tolist()


def values_of(nla: Explainer, corpus: Corpus, layer: int, neurons: list[int]) -> np.ndarray:
    """Returns the activations [N, len(neurons)] of neurons on the corpus."""
    return np.concatenate(neuron_values(nla, corpus, layer, lambda values: values[:, neurons]))
