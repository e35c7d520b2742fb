"""Writes tests/golden/*.npz: what transformers computes for tiny random Llama models (needs torch).

Not part of the suite; run `python tests/make_golden.py` after changing a shape below. Each file holds
`config` (config.json as a string), `weight/<HF name>` (float32), `names`, `input_ids` [B, T] int64,
`attention_mask` [B, T] bool (the last two rows are right- and left-padded), `logits` [B, T, V] and
`hidden_states` [L + 1, B, T, d], where index 0 is the embeddings and K + 1 the output of block K.
Values at masked positions mean nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parent / "golden"

SHAPES = {
    # Tied head, grouped queries.
    "tied": dict(
        vocab_size=96, hidden_size=32, num_layers=3, heads=(4, 2), head_dim=8, intermediate_size=48, tied=True
    ),
    # Untied head, odd numbers of heads, a head size that is not hidden_size / heads.
    "odd_heads": dict(
        vocab_size=80, hidden_size=36, num_layers=2, heads=(9, 3), head_dim=6, intermediate_size=56, tied=False
    ),
    # Llama 3's RoPE scaling, with constants that put wavelengths in all three of its ranges.
    "rope_llama3": dict(
        vocab_size=64,
        hidden_size=24,
        num_layers=2,
        heads=(3, 1),
        head_dim=16,
        intermediate_size=40,
        tied=True,
        rope={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}
BATCH, TIME = 4, 14


def model_of(shape: dict, seed: int) -> tuple[LlamaForCausalLM, dict]:
    """A random model and the fields of its config.json."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["heads"][0],
        "num_key_value_heads": shape["heads"][1],
        "head_dim": shape["head_dim"],
        "intermediate_size": shape["intermediate_size"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 512,
        "tie_word_embeddings": shape["tied"],
    }
    if "rope" in shape:
        fields["rope_scaling"] = shape["rope"]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig.from_dict(dict(fields), attn_implementation="eager")).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Large enough for attention and norms to matter: HF's 0.02 would leave the blocks near the identity.
            weight.copy_(1 + 0.2 * torch.randn_like(weight) if "norm" in name else 0.3 * torch.randn_like(weight))
    return model, fields


def batch_of(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, T]: two full rows, one padded on the right, one on the left."""
    ids = torch.randint(1, vocab_size, (BATCH, TIME))
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[2, TIME - 5 :] = False
    mask[3, :4] = False
    return ids.masked_fill(~mask, 0), mask


def run(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Logits and hidden states. Hooks, because HF's last hidden state has the final norm applied."""
    states: list[torch.Tensor] = []
    hooks = [model.model.embed_tokens.register_forward_hook(lambda module, args, output: states.append(output))]
    for block in model.model.layers:
        hooks.append(
            block.register_forward_hook(
                lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
            )
        )
    # Positions count real tokens only, as generation with left padding has it.
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(states) == model.config.num_hidden_layers + 1
    for ours, theirs in zip(states[:-1], output.hidden_states[:-1], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.allclose(model.model.norm(states[-1]), output.hidden_states[-1])
    return output.logits.numpy(), torch.stack(states).numpy()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, shape) in enumerate(SHAPES.items()):
        model, fields = model_of(shape, seed)
        ids, mask = batch_of(shape["vocab_size"])
        logits, hidden_states = run(model, ids, mask)
        state = {key: value.numpy() for key, value in model.state_dict().items()}
        if shape["tied"]:
            state.pop("lm_head.weight")
        path = GOLDEN / f"{name}.npz"
        np.savez_compressed(
            path,
            config=json.dumps(fields, indent=2),
            names=np.array(sorted(state)),
            input_ids=ids.numpy(),
            attention_mask=mask.numpy(),
            logits=logits,
            hidden_states=hidden_states,
            **{f"weight/{key}": value for key, value in state.items()},
        )
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, logits sd {logits.std():.2f}")


if __name__ == "__main__":
    main()
