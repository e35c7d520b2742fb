"""The last stage: it measures how well explanations of held-out activations rebuild them."""

from __future__ import annotations

import contextlib

import numpy as np

from nlae_jax.data.mismatch import mismatched, of_others
from nlae_jax.evaluate.claims import claims, parts
from nlae_jax.evaluate.health import MEASURES, Watch, health, share_among
from nlae_jax.evaluate.reconstruction import UNINFORMED, direction_mse, summarise, uninformed
from nlae_jax.evaluate.work import ONE_DOCUMENT
from nlae_jax.report.page import SAMPLES
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair
from nlae_jax.roles.roundtrip import Explanations, RoundTrip
from nlae_jax.run.resources import PreparedRun, Purpose, Run, descriptions_of
from nlae_jax.run.suite import sections_in
from nlae_jax.run.training import trained_pair, warm_started_pair
from nlae_jax.runtime import processes, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, json_line, read_fields, write_json, write_text
from nlae_jax.runtime.progress import progress, say, warn

# Rows of the controls whose explanations are written from uninformed vectors. They cost three more rollouts, and their
# numbers need not be exact.
_UNINFORMED_ROWS = 32

# Rows that are also rebuilt from parts of their explanations, with one pass of the decoder for each part.
_PART_ROWS = 128

# Fields of eval.json that the report and other readers need.
_NEEDED = {"fve", "fve_ci95", "fve_before_rl", "fve_gain", "fve_gain_ci95", "fve_shuffled", "fve_text", "num_documents"}


def is_evaluated(run: Run) -> bool:
    """Returns whether eval.json and the samples exist. All processes must call it together; the first one looks."""
    return processes.by_first(lambda: _is_evaluated(run.workdir))


def evaluate(run: PreparedRun) -> None:
    """Runs held-out activations through the pair before and after RL. Writes eval.json and samples/held_out.jsonl."""
    if is_evaluated(run):
        return
    after, before = trained_pair(run), warm_started_pair(run)
    config, rows = run.config.eval, run.held_out_rows()
    h = run.store.vectors(rows)
    documents = run.store.index.document[rows]
    trip = RoundTrip(run.roles, run.tokenizer, config.batch_size, run.config.rl.max_new_tokens, run.mesh)
    seed = run.seed(Purpose.EVAL)
    mse_uninformed: dict[str, np.ndarray] = {}
    with progress(5 + len(UNINFORMED), "eval", unit="pass") as bar:
        mse_before, _, _ = _round_trip(trip, before, h, seed, config.temperature)
        bar.advance()
        mse_after, written, rebuilt = _round_trip(trip, after, h, seed, config.temperature)
        bar.advance()
        readable = np.array([bool(text) for text in written.texts])
        from_text = trip.reconstruct_texts(after, written.texts)
        bar.advance()
        described = descriptions_of(run) if run.config.sft.learns else {}
        gold = np.array([described.get(row, "") for row in rows.tolist()])
        from_gold = trip.reconstruct_texts(after, gold.tolist())
        bar.advance()
        measured: dict[str, float | None] = {**health(written.texts, run.protocol.marker)}
        for name, vectors in uninformed(h, seed).items():
            mse_uninformed[name], texts = _uninformed_mse(trip, after, vectors, h, seed, config.temperature)
            measured[f"identical_to_{name}"] = share_among(written.texts[: len(texts)], texts)
            bar.advance()
        contexts = [_context(run, row)[0] for row in rows.tolist()]
        mse_of_parts = _mse_of_parts(trip, after, written.texts, contexts, h)
        bar.advance()
        likeliest = _likeliest_tokens(run, rows)
    other = mismatched(documents, seed)
    if len(np.unique(documents)) < 2:
        warn(ONE_DOCUMENT)
    mse = {
        "before": mse_before,
        "after": mse_after,
        "text": direction_mse(from_text, h, readable),
        "shuffled": of_others(direction_mse(rebuilt[other], h, (written.length > 0)[other]), documents, other),
        "gold": np.where(gold != "", direction_mse(from_gold, h), np.nan),
        **mse_uninformed,
        **mse_of_parts,
    }

    def write() -> None:
        with np.errstate(divide="ignore", invalid="ignore"):  # where all activations are alike
            summary = summarise(h, documents, mse, config.bootstrap_samples, seed)
        if unknown := [name for name, value in summary.items() if value is not None and not np.isfinite(value).all()]:
            warn(f"eval: no finite number, null in eval.json: {', '.join(unknown)}; are all activations alike?")
        summary["extraction_rate"] = float((written.length > 0).mean())
        summary["truncated_rate"] = float(written.truncated.mean())
        summary["temperature"] = config.temperature
        exchanged_with = [None if documents[j] == documents[i] else int(j) for i, j in enumerate(other)]
        summary |= claims(written.texts, contexts, likeliest, exchanged_with)
        summary |= {measure.key: measured.get(measure.key) for measure in MEASURES if measure.key not in summary}
        _write_samples(run, rows, written, mse_after, gold)
        write_json(run.workdir / "eval.json", summary | sections_in(run.workdir))
        Watch("eval").check(summary, f"{len(h)} held-out activations")

    processes.by_first(write)


def _is_evaluated(workdir: AnyPath) -> bool:
    """Returns whether both files exist and eval.json has all needed fields. eval.json is the last to be written."""
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
    trip: RoundTrip, pair: Pair, h_NxD: np.ndarray, seed: int, temperature: float
) -> tuple[np.ndarray, Explanations, np.ndarray]:
    """Returns each activation's mse [N] (2 where nothing was readable), explanation and reconstruction [N, d]."""
    written = trip.explain(pair, h_NxD, seed, temperature)
    rebuilt_NxD = trip.reconstruct_ids(pair, written.ids, written.length)
    return direction_mse(rebuilt_NxD, h_NxD, written.length > 0), written, rebuilt_NxD


def _uninformed_mse(
    trip: RoundTrip, pair: Pair, vectors_NxD: np.ndarray, h_NxD: np.ndarray, seed: int, temperature: float
) -> tuple[np.ndarray, list[str]]:
    """Explains `vectors` [N, d], which say nothing about `h` [N, d], and compares the reconstructions with `h`.

    Returns the mse [N] and the texts. Only the first `_UNINFORMED_ROWS` rows are used; the mse is NaN beyond them. Each
    row has the random draws of its true explanation, so an encoder that does not read its vector writes the same text.
    """
    rows = slice(min(len(h_NxD), _UNINFORMED_ROWS))
    mse_N = np.full(len(h_NxD), np.nan)
    written = trip.explain(pair, vectors_NxD[rows], seed, temperature)
    rebuilt_NxD = trip.reconstruct_ids(pair, written.ids, written.length)
    mse_N[rows] = direction_mse(rebuilt_NxD, h_NxD[rows], written.length > 0)
    return mse_N, written.texts


def _mse_of_parts(
    trip: RoundTrip, pair: Pair, texts: list[str], contexts: list[str], h_NxD: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns part of the explanations (see `claims.parts`) -> mse [N] of the reconstructions from that part alone.

    It is 2 where the part of a row is empty, and NaN beyond the first `_PART_ROWS` rows.
    """
    count = min(len(h_NxD), _PART_ROWS)
    rows = [parts(text, context) for text, context in zip(texts[:count], contexts, strict=False)]
    mse = {}
    for name in rows[0]:
        part_texts = [row[name] for row in rows]
        rebuilt = trip.reconstruct_texts(pair, part_texts)
        mse[name] = np.full(len(h_NxD), np.nan)
        mse[name][:count] = direction_mse(rebuilt, h_NxD[:count], np.array([bool(text) for text in part_texts]))
    return mse


def _likeliest_tokens(run: Run, rows_N: np.ndarray) -> list[str]:
    """Returns the subject's likeliest next token, as text, after each row's context; '' where it is not known.

    Where extraction did not store the tokens, the subject computes them, if its weights are in memory anyhow.
    """
    stored = run.store.next_tokens(rows_N)
    if stored.shape[1]:
        return [run.tokenizer.decode([token]) for token in stored[:, 0].tolist()]
    if run.config.dataset.rl or not run.config.lora.rank or world.count() > 1:
        return [""] * len(rows_N)
    subject = LanguageModel(run.arch, run.base, run.tokenizer)
    likeliest = subject.generate([run.store.context_ids(row).tolist() for row in rows_N.tolist()], 1, temperature=0.0)
    return [run.tokenizer.decode(tokens) for tokens in likeliest]


def _write_samples(run: Run, rows_N: np.ndarray, written: Explanations, mse_N: np.ndarray, gold_N: np.ndarray) -> None:
    """Writes one JSON line for each evaluated row."""
    index = run.store.index
    lines = []
    for i, row in enumerate(rows_N.tolist()):
        context, token = _context(run, row)
        sample = {
            "doc_id": index.doc_ids[index.document[row]],
            "position": int(index.position[row]),
            "context": context,
            "token": token,
            "explanation": written.texts[i],
            "gold": str(gold_N[i]),
            "cos": float(1 - mse_N[i] / 2),
            "mse": float(mse_N[i]),
            "closed": bool(written.length[i] > 0),
        }
        lines.append(json_line(sample))
    write_text(run.workdir / SAMPLES, "\n".join(lines) + "\n")


def _context(run: Run, row: int) -> tuple[str, str]:
    """Returns the text up to the row's position, and its last token. Both are '' where a dataset has no text."""
    if run.config.dataset.rl:
        text = run.store.contexts.get(row, "")
        return text, run.tokenizer.decode(run.tokenizer.encode(text, add_special_tokens=False)[-1:])
    ids = run.store.context_ids(row)
    return run.tokenizer.decode(ids, skip_special_tokens=True), run.tokenizer.decode(ids[-1:])
