"""What notebooks and the command line use of a trained pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nlae_jax.config import MeshConfig, load_config
from nlae_jax.errors import UserError
from nlae_jax.evaluate.reconstruction import direction_mse
from nlae_jax.evaluate.roundtrip import Pair, RoundTrip
from nlae_jax.language_model import LanguageModel
from nlae_jax.mesh import make_mesh
from nlae_jax.progress import progress
from nlae_jax.run import Run
from nlae_jax.stages import trained_pair

_BATCH = 16
MAX_TOKENS = 2048  # of one text: the subject reads it in one piece, and attention grows with its square


class NLA:
    """A trained encoder and decoder with the subject they read. Make one with `from_workdir`."""

    def __init__(self, subject: LanguageModel, layer: int, run: Run, pair: Pair) -> None:
        self.subject, self.layer = subject, layer
        self._run, self._pair = run, pair
        self._trips: dict[int, RoundTrip] = {}

    @staticmethod
    def from_workdir(workdir: str | Path) -> NLA:
        """The pair that a run has trained so far: by RL up to its newest checkpoint, else by the warm start.

        Changes nothing in the workdir, and may be used while the run goes on. It computes on the run's mesh where
        this machine has the devices for it, on one device otherwise.
        """
        workdir = Path(workdir)
        if not (workdir / "config.json").exists():
            raise UserError(f"--workdir {workdir}: no config.json there; it should be the workdir of a run")
        config = load_config(workdir / "config.json")
        try:
            make_mesh(config.mesh)
        except UserError:
            config = dataclasses.replace(config, mesh=MeshConfig())
        run = Run(config, workdir, read_only=True)
        subject = LanguageModel(run.arch, run.base, run.tokenizer)
        return NLA(subject, run.config.subject.layer, run, trained_pair(run))

    def explain(self, vectors: Any, temperature: float = 0.0, max_new_tokens: int = 150, seed: int = 0) -> list[str]:
        """[B, d] raw activations -> one explanation each; '' where the encoder did not close its tag."""
        vectors, trip = self._checked(vectors), self._trip(max_new_tokens)
        with progress(len(vectors), "explain", unit="activation") as bar:
            return trip.explain(self._pair, vectors, seed, temperature, bar.advance).texts

    def reconstruct(self, texts: Sequence[str]) -> np.ndarray:
        """Explanations -> activations [B, d] float32, raw as the decoder's head gives them."""
        if not len(texts):
            return np.zeros((0, self.subject.arch.d_model), np.float32)
        return self._trip(150).reconstruct_texts(self._pair, texts)

    def score(self, texts: Sequence[str], vectors: Any) -> tuple[np.ndarray, np.ndarray]:
        """(mse, cos), each [B]: how well each text rebuilds its vector's direction; mse = 2 (1 - cos)."""
        if not len(texts):
            return np.zeros(0), np.zeros(0)
        vectors = self._checked(vectors)
        if len(texts) != len(vectors):
            raise UserError(f"score: {len(texts)} texts for {len(vectors)} vectors; there should be one each")
        mse = direction_mse(self.reconstruct(texts), vectors, np.array([bool(text.strip()) for text in texts]))
        return mse, 1 - mse / 2

    def explain_text(self, text: str, temperature: float = 0.0) -> list[dict[str, Any]]:
        """Every token's explanation: dicts of position, token, explanation, cos, mse.

        Position 0 is an attention sink whose activation holds nothing of the text; read it with that in mind.
        """
        tokenizer = self.subject.tokenizer
        ids = tokenizer.encode(text)
        if len(ids) > MAX_TOKENS:
            raise UserError(f"text: {len(ids)} tokens; at most {MAX_TOKENS} are explained at once: cut it into parts")
        width = -(-len(ids) // 64) * 64
        padded, mask = np.zeros((1, width), np.int32), np.arange(width)[None] < len(ids)
        padded[0, : len(ids)] = ids
        vectors = np.asarray(self.subject.residual(padded, self.layer, mask=mask))[0, : len(ids)]
        texts = self.explain(vectors, temperature, self._run.config.rl.max_new_tokens)
        mse, cos = self.score(texts, vectors)
        return [
            {
                "position": position,
                "token": tokenizer.decode([ids[position]]),
                "explanation": texts[position],
                "cos": float(cos[position]),
                "mse": float(mse[position]),
            }
            for position in range(len(ids))
        ]

    def _trip(self, max_new_tokens: int) -> RoundTrip:
        """Compiled functions for one length limit; made once each."""
        if max_new_tokens <= (least := len(self._run.protocol.closing)):
            raise UserError(f"max_new_tokens: {max_new_tokens} should be more than the {least} of the closing tag")
        if max_new_tokens not in self._trips:
            self._trips[max_new_tokens] = RoundTrip(self._run.roles, self.subject.tokenizer, _BATCH, max_new_tokens)
        return self._trips[max_new_tokens]

    def _checked(self, vectors: Any) -> np.ndarray:
        vectors = np.asarray(jax.device_get(vectors), np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.subject.arch.d_model:
            raise UserError(f"vectors: shape {vectors.shape} should be [number, {self.subject.arch.d_model}]")
        if not len(vectors):
            raise UserError("vectors: none given; there should be at least one")
        if not np.isfinite(vectors).all():
            raise UserError("vectors: NaN or infinity among them")
        return vectors
