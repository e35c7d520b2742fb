"""The last stage: how well explanations of held-out activations rebuild them."""

from __future__ import annotations

import contextlib
import json

import numpy as np

from nlae_jax import hosts
from nlae_jax.errors import UserError
from nlae_jax.evaluate.reconstruction import direction_mse, mismatched, summarise
from nlae_jax.evaluate.report import SAMPLES
from nlae_jax.evaluate.roundtrip import Explanations, Pair, RoundTrip
from nlae_jax.files import AnyPath, plain, read_fields, write_json, write_text
from nlae_jax.progress import progress, say, warn
from nlae_jax.run import Purpose, Run
from nlae_jax.stages.training import decoder_sft, encoder_sft, pair_of, rl

# Fields of eval.json that whoever shows it counts on.
_NEEDED = {"fve", "fve_ci95", "fve_before_rl", "fve_gain", "fve_gain_ci95", "fve_shuffled", "fve_text", "num_documents"}


def evaluate(run: Run) -> None:
    """Held-out activations through the pair before and after RL -> eval.json and samples/held_out.jsonl."""
    if hosts.by_first(lambda: _is_evaluated(run.workdir)):
        return
    after = pair_of(run, *rl(run))
    before = pair_of(run, encoder_sft(run), decoder_sft(run))
    config, rows = run.config.eval, run.held_out_rows()
    h = run.store.vectors(rows)
    documents = run.store.plan.document[rows]
    trip = RoundTrip(run.roles, run.tokenizer, config.batch_size, run.config.rl.max_new_tokens, run.mesh)
    seed = run.seed(Purpose.EVAL)
    with progress(4, "eval", unit="pass") as bar:
        mse_before, _, _ = _round_trip(trip, before, h, seed, config.temperature)
        bar.advance()
        mse_after, written, rebuilt = _round_trip(trip, after, h, seed, config.temperature)
        bar.advance()
        readable = np.array([bool(text) for text in written.texts])
        from_text = trip.reconstruct_texts(after, written.texts)
        bar.advance()
        described = run.descriptions if run.warm_start else {}
        gold = np.array([described.get(row, "") for row in rows.tolist()])
        from_gold = trip.reconstruct_texts(after, gold.tolist())
        bar.advance()
    other = mismatched(documents, seed)
    mse = {
        "before": mse_before,
        "after": mse_after,
        "text": direction_mse(from_text, h, readable),
        "shuffled": direction_mse(rebuilt[other], h, (written.length > 0)[other]),
        "gold": np.where(gold != "", direction_mse(from_gold, h), np.nan),
    }

    def write() -> None:
        with np.errstate(divide="ignore", invalid="ignore"):  # where all activations are alike
            summary = summarise(h, documents, mse, config.bootstrap_samples, seed)
        if unknown := [name for name, value in summary.items() if value is not None and not np.isfinite(value).all()]:
            warn(f"eval: no finite number, null in eval.json: {', '.join(unknown)}; are all activations alike?")
        summary["extraction_rate"] = float((written.length > 0).mean())
        summary["temperature"] = config.temperature
        _write_samples(run, rows, written, mse_after, gold)
        write_json(run.workdir / "eval.json", summary)

    hosts.by_first(write)


def _is_evaluated(workdir: AnyPath) -> bool:
    """Whether both files are there. eval.json is the last to be written; what is no result is made again."""
    if not (workdir / "eval.json").exists():
        return False
    missing = not (workdir / SAMPLES).exists()
    with contextlib.suppress(UserError):
        missing = missing or not read_fields(workdir / "eval.json", {"num_activations": int}).keys() >= _NEEDED
        if not missing:
            return True
    say(f"{SAMPLES} is missing or eval.json is not as it was written: made again")
    return False


def _round_trip(
    trip: RoundTrip, pair: Pair, h: np.ndarray, seed: int, temperature: float
) -> tuple[np.ndarray, Explanations, np.ndarray]:
    """Per activation its mse (2 where nothing was readable), its explanation and its reconstruction [N, d]."""
    written = trip.explain(pair, h, seed, temperature)
    rebuilt = trip.reconstruct_ids(pair, written.ids, written.length)
    return direction_mse(rebuilt, h, written.length > 0), written, rebuilt


def _write_samples(run: Run, rows: np.ndarray, written: Explanations, mse: np.ndarray, gold: np.ndarray) -> None:
    plan = run.store.plan
    lines = []
    for i, row in enumerate(rows.tolist()):
        context, token = _context(run, row)
        sample = {
            "doc_id": plan.doc_ids[plan.document[row]],
            "position": int(plan.position[row]),
            "context": context,
            "token": token,
            "explanation": written.texts[i],
            "gold": str(gold[i]),
            "cos": float(1 - mse[i] / 2),
            "mse": float(mse[i]),
            "closed": bool(written.length[i] > 0),
        }
        lines.append(json.dumps(plain(sample), ensure_ascii=False, allow_nan=False))
    write_text(run.workdir / SAMPLES, "\n".join(lines) + "\n")


def _context(run: Run, row: int) -> tuple[str, str]:
    """The text up to the row's position and its last token; '' where a dataset does not say."""
    if run.config.dataset.rl:
        text = run.store.contexts.get(row, "")
        return text, run.tokenizer.decode(run.tokenizer.encode(text, add_special_tokens=False)[-1:])
    ids = run.store.context_ids(row)
    return run.tokenizer.decode(ids, skip_special_tokens=True), run.tokenizer.decode(ids[-1:])
