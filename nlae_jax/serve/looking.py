"""Examines a neuron or direction in a few seconds: it explains the mean activation pushed along the direction.

`nlae neuron` and `nlae direction` also examine contexts and surprisal, which takes minutes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nlae_jax.explore.directions import STEPS, control_directions, heard_of, pushed_along, token_effects, unit
from nlae_jax.explore.neurons import neuron_directions, parse_neuron
from nlae_jax.serve.service import Service

_TOKENS = 8  # promoted tokens, and as many suppressed ones


async def look_at(service: Service, vector: np.ndarray | None, neuron: str, side: str) -> dict[str, Any]:
    """Examines a neuron's `write`, `gate` or `up` direction, or a `vector` [d], beside two controls.

    The controls are a random direction and a shuffle of the components. Raises UserError where the neuron does not
    exist.
    """
    reader = service.reader
    if vector is None:
        layer, index = parse_neuron(neuron, reader.subject.arch)
        vectors = await service.on_device(lambda: neuron_directions(reader.explainer, layer, index))
        vector = vectors[side]
    kinds = [("direction", unit(vector)), *control_directions(unit(vector), 1, 0)]
    pushed = await service.on_device(lambda: pushed_along(reader.explainer, [u for _, u in kinds], STEPS))
    keys = [h.tobytes() for h in pushed]
    explanations = await service.all_explained(list(pushed), keys, reader.usual_new_tokens, 0.0, 0)
    texts = [explanation.description for explanation in explanations]
    rebuilt = await service.on_device(lambda: reader.reconstruct(texts))
    heard = heard_of(rebuilt, pushed).tolist()
    promoted, suppressed = await service.on_device(lambda: token_effects(reader.explainer, vector, _TOKENS))
    sweeps = []
    for number, (kind, _) in enumerate(kinds):
        rows = range(1 + number * len(STEPS), 1 + (number + 1) * len(STEPS))
        points = [
            {"r": r, "explanation": texts[row], "heard": heard[row - 1]} for r, row in zip(STEPS, rows, strict=True)
        ]
        sweeps.append({"kind": kind, "points": points})
    return {"mean": texts[0], "sweeps": sweeps, "promoted": promoted, "suppressed": suppressed}
