"""The same RL step and warm-start step in PyTorch + transformers, as the PyTorch implementations do them.

Every sample carries the whole prompt: `generate` from injected embeddings, the decoder's forward pass for the reward,
the reference's log-probs, the policy's forward and backward pass over prompt and response, the decoder's training pass.

    python benchmarks/torch_step.py --model DIR --layer 20 [--rank 16] [--prompt 125 --slot 95 --response 48]

Prints one JSON object: median seconds of each phase. Needs torch and transformers; random activations and prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INJECTION_SCALE = 230.0


class Adapted(torch.nn.Module):
    """A frozen linear layer with a low-rank adapter beside it."""

    def __init__(self, linear: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = torch.nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.b = torch.nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (x @ self.a.T) @ self.b.T


def adapt(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """Adapters on every linear layer of the blocks, all else frozen; rank 0 leaves the model as it is."""
    if rank:
        model.requires_grad_(False)
        for block in model.layers:
            for part in (block.self_attn, block.mlp):
                for name in LINEARS:
                    if hasattr(part, name):
                        setattr(part, name, Adapted(getattr(part, name), rank))
    return model


def unit(v: torch.Tensor) -> torch.Tensor:
    """Scaled to norm sqrt(d)."""
    return v * (v.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


class Peer:
    """Encoder, its frozen reference, decoder and optimisers; `times` collects the seconds of the phases."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.times = options, {}
        load = lambda: AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)  # noqa: E731
        self.encoder, self.reference, trunk = load(), load().eval().requires_grad_(False), load().model
        trunk.layers, trunk.norm = trunk.layers[: options.layer + 1], torch.nn.Identity()
        adapt(self.encoder.model, options.rank), adapt(trunk, options.rank)
        if options.rank:
            self.encoder.lm_head.requires_grad_(False)
        self.width = self.encoder.config.hidden_size
        self.trunk, self.head = trunk, torch.nn.Linear(self.width, self.width, bias=False)
        self.prompt = torch.randint(5, self.encoder.config.vocab_size - 100, (1, options.prompt))
        self.wrap = self.prompt[:, : options.wrap]
        trained = lambda *modules: [p for m in modules for p in m.parameters() if p.requires_grad]  # noqa: E731
        self.encoder_optimizer = torch.optim.AdamW(trained(self.encoder), lr=1e-5)
        self.decoder_optimizer = torch.optim.AdamW(trained(trunk, self.head), lr=5e-5)

    def timed(self, phase: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = run()
        self.times.setdefault(phase, []).append(time.perf_counter() - begin)
        return result

    def prompts(self, h: torch.Tensor) -> torch.Tensor:
        """Embedded prompts [N, P, d] with the vectors in the slot."""
        x = self.encoder.get_input_embeddings()(self.prompt).expand(len(h), -1, -1).clone()
        x[:, self.options.slot] = h / h.norm(dim=-1, keepdim=True) * INJECTION_SCALE
        return x

    def log_probs(self, model: Any, h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[N, R]; the head on response positions only."""
        x = torch.cat([self.prompts(h), self.encoder.get_input_embeddings()(tokens)], 1)
        hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, self.options.prompt - 1 : -1]
        logits = model.lm_head(hidden).float()
        return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)

    def mse(self, h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([self.wrap.expand(len(tokens), -1), tokens], 1)
        rebuilt = self.head(self.trunk(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
        return (unit(rebuilt) - unit(h)).square().mean(-1)

    @torch.no_grad()
    def rollout(self, h: torch.Tensor) -> torch.Tensor:
        length = self.options.response
        return self.encoder.generate(
            inputs_embeds=self.prompts(h),
            attention_mask=torch.ones(len(h), self.options.prompt, dtype=torch.long),
            min_new_tokens=length,
            max_new_tokens=length,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )

    def micro(self, count: int) -> Iterator[slice]:
        size = self.options.micro
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def policy(self, h: torch.Tensor, tokens: torch.Tensor, advantage: torch.Tensor, reference: torch.Tensor) -> None:
        self.encoder_optimizer.zero_grad()
        for part in self.micro(len(h)):
            log_probs = self.log_probs(self.encoder, h[part], tokens[part])
            delta = reference[part] - log_probs
            ratio = (log_probs - log_probs.detach()).exp()
            loss = (-ratio * advantage[part, None] + 0.01 * (delta.exp() - delta - 1)).mean()
            (loss * len(log_probs) / len(h)).backward()
        self.encoder_optimizer.step()

    def decoder(self, h: torch.Tensor, tokens: torch.Tensor) -> None:
        self.decoder_optimizer.zero_grad()
        for part in self.micro(len(h)):
            (self.mse(h[part], tokens[part]).sum() / len(h)).backward()
        self.decoder_optimizer.step()

    def rl_step(self) -> None:
        options = self.options
        h = torch.randn(options.activations, self.width).repeat_interleave(options.group, 0)
        tokens = self.timed("rollout", lambda: self.rollout(h))
        with torch.no_grad():
            reward = -self.timed("reward", lambda: self.mse(h, tokens)).view(-1, options.group)
            spread = reward.std(1, keepdim=True) + 1e-6
            advantage = ((reward - reward.mean(1, keepdim=True)) / spread).view(-1)
            parts = lambda: torch.cat([self.log_probs(self.reference, h[p], tokens[p]) for p in self.micro(len(h))])  # noqa: E731
            reference = self.timed("reference", parts)
        self.timed("policy", lambda: self.policy(h, tokens, advantage, reference))
        self.timed("decoder", lambda: self.decoder(h, tokens))

    def encoder_sft(self) -> None:
        h = torch.randn(self.options.sft_batch, self.width)
        tokens = torch.randint(5, self.encoder.config.vocab_size, (len(h), self.options.response))

        def step() -> None:
            self.encoder_optimizer.zero_grad()
            for part in self.micro(len(h)):
                (-self.log_probs(self.encoder, h[part], tokens[part]).mean() * len(h[part]) / len(h)).backward()
            self.encoder_optimizer.step()

        self.timed("encoder_sft", step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory in the HF layout")
    for name, value in {
        "layer": 20,
        "rank": 0,
        "prompt": 125,
        "slot": 95,
        "wrap": 12,
        "response": 48,
        "activations": 4,
        "group": 8,
        "sft_batch": 16,
        "micro": 8,
        "repeats": 3,
        "threads": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    peer = Peer(options)
    for _ in range(options.repeats + 1):
        peer.rl_step()
        peer.encoder_sft()
    seconds = {phase: statistics.median(times[1:]) for phase, times in peer.times.items()}
    seconds["rl_step"] = sum(value for phase, value in seconds.items() if phase != "encoder_sft")
    print(json.dumps({"seconds": seconds, "samples": options.activations * options.group}))


if __name__ == "__main__":
    main()
