"""The class `NLA`: a trained pair as notebooks and the command line use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nlae_jax.config import CorpusConfig, DescribeConfig, ProtocolConfig
from nlae_jax.data.providers import rewriter
from nlae_jax.evaluate.cost import Asked, Extras, cost_text
from nlae_jax.evaluate.figures import SECTIONS
from nlae_jax.evaluate.judge import judged
from nlae_jax.evaluate.rewordings import rewordings
from nlae_jax.evaluate.rows import EvaluatedRows, check_rows, rows_of
from nlae_jax.evaluate.suite import check_additions, run_suite, sections_of
from nlae_jax.evaluate.trained_controls import default_steps, trained_controls
from nlae_jax.evaluate.work import Sizes, Work, pairing_of
from nlae_jax.explore import steer as steering
from nlae_jax.explore.audit import AuditReport, audit, check_several, explained_passages, permuted, term_pattern
from nlae_jax.explore.corpus import Corpus, read_corpus
from nlae_jax.explore.directions import DirectionReport, DirectionSettings, explain_direction
from nlae_jax.explore.explain import ExplainedRows, Options, explain_passages
from nlae_jax.explore.explainer import LARGEST_BATCH, Explainer, package_statistics
from nlae_jax.explore.neurons import explain_neuron, parse_neuron
from nlae_jax.explore.passage import read_chat, read_passage, read_text
from nlae_jax.explore.select import parse_at, picks_of
from nlae_jax.explore.sources import (
    has_activations,
    known_statistics,
    mapped_subject,
    open_trained,
    released_subject,
    run_statistics,
    run_texts,
)
from nlae_jax.explore.statistics import Statistics
from nlae_jax.explore.vector_files import Direction, read_direction
from nlae_jax.interop.adapt import WARNING, is_adapter, read_adapter
from nlae_jax.interop.released import Released, open_released, pair_sidecar, pair_tokenizer
from nlae_jax.interop.sidecar import protocol_of
from nlae_jax.lm.pretrained import load_tokenizer, resolve_model, stop_ids
from nlae_jax.roles.decoder import Decoder
from nlae_jax.roles.encoder import Encoder
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair, Roles
from nlae_jax.roles.protocol import Protocol
from nlae_jax.run.resources import PreparedRun
from nlae_jax.run.training import trained_pair
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path, workdir_path
from nlae_jax.runtime.progress import say, warn


class NLA(Explainer):
    """A trained encoder and decoder, and the subject they read. Make one with `from_workdir` or `from_pretrained`."""

    @staticmethod
    def from_workdir(workdir: str | Path) -> NLA:
        """Loads the pair that a run has trained so far: RL's newest checkpoint, or the warm start if there is none.

        The workdir is only read, so the run may still be in progress. The pair computes on the run's mesh if this
        machine has the devices of the mesh, else on one device. Raises UserError if `workdir` is not the workdir of a
        run whose warm start is finished.
        """
        return NLA.from_run(open_trained(workdir), str(workdir))

    @staticmethod
    def from_run(run: PreparedRun, name: str) -> NLA:
        """Does what `from_workdir` does, for a run that is already open."""
        stops = stop_ids(run.directory, run.tokenizer)
        subject = lambda: LanguageModel(run.arch, run.base, run.tokenizer, run.mesh, stops)  # noqa: E731
        return NLA(
            run.roles,
            trained_pair(run),
            run.tokenizer,
            subject,
            run.config.rl.max_new_tokens,
            run.mesh,
            lambda pair: run_statistics(run) if has_activations(run) else package_statistics(pair),
            name,
            lambda count: run_texts(run, count) if has_activations(run) else (),
            run.config.subject.model,
        )

    @staticmethod
    def from_pretrained(
        av: str | Path, ar: str | Path = "", subject: str = "", dtype: str = "float32", mesh: Mesh | None = None
    ) -> NLA:
        """Loads a pair in the reference's layout: directories or hub ids of an encoder and its decoder.

        Without `ar`, `av` names the whole pair: a shipped pair ("smollm2-135m"), or a directory with `av` and `ar`. The
        directories may hold adapters; the base model that the adapters name is then loaded too (`lm.adapters`). `av`
        may also be a directory that `nlae adapt` wrote.

        Prompts, slot and scale come from the sidecars, which are checked against the tokenizer. `subject` is the model
        whose activations are explained; by default the sidecar names the model. Weights are stored in `dtype`
        ("float32" or "bfloat16"), on the default device or split over `mesh`. Raises UserError that names the file and
        field if a part of the pair is missing or does not fit.
        """
        if not ar and is_adapter(directory := local_path(av, "model")):
            return _adapted(directory, subject, dtype, mesh)
        encoder, decoder = open_released(str(av), "av"), open_released(str(ar or av), "ar")
        sidecar, tokenizer = pair_sidecar(encoder, decoder), pair_tokenizer(encoder, decoder)
        protocol = protocol_of(sidecar, tokenizer, ProtocolConfig(), encoder.injection_scale)
        statistics = known_statistics(str(av))
        if adapters := encoder.adapters or decoder.adapters:
            if subject and resolve_model(subject).resolve() != encoder.directory.resolve():
                raise UserError(
                    f"subject: {subject}: the pair's adapters sit on {adapters.base_model}, which is its subject"
                )
            return _with_adapters(encoder, decoder, protocol, tokenizer, dtype, mesh, statistics, str(av))
        layer = decoder.decoder_layer
        roles = Roles(Encoder(encoder.arch, protocol), Decoder(decoder.arch, layer, protocol), rank=0)
        trained = {"lm": decoder.weights(dtype, mesh), "value_head": decoder.value_head(mesh)}
        pair = Pair({}, {"lm": encoder.weights(dtype, mesh)}, trained)
        load_subject = lambda: released_subject(subject, sidecar, layer, tokenizer, dtype, mesh)  # noqa: E731
        return NLA(
            roles,
            pair,
            tokenizer,
            load_subject,
            encoder.max_new_tokens,
            mesh,
            statistics,
            str(av),
            subject_name=subject or sidecar.base_model or "subject",
            base_name=sidecar.base_model or "",
        )

    def explain_text(
        self,
        text: str,
        temperature: float | None = None,
        positions: str | Sequence[int] | None = None,
        match: str | None = None,
        span: str | None = None,
        **options: Any,
    ) -> ExplainedRows:
        """Explains every token of a text, or the selected tokens. Returns one dict for each explained token or span.

        The dicts have the fields of `explore.explain.Explained`, such as `token`, `explanation`, `cos` and `mse`.
        `positions` ("-1", "3,5,-2", "10:20"), `match` (a phrase) and `span` (a range or phrase whose mean activation is
        explained) select tokens. `options` are further fields of `explore.explain.Options`. The explanation at position
        0 means little, because the activation of this attention sink does not depend on the text. Raises UserError for
        an empty text, a selection without tokens, or a text that is too long.
        """
        passage = read_text(self.tokenizer, self.subject.arch.vocab_size, text)
        picks = picks_of(passage, positions, match, span)
        (explained,) = explain_passages(self, [(passage, picks)], Options(temperature=temperature, **options))
        return ExplainedRows(explained, self.name, self.layer)

    def explain_texts(self, texts: Sequence[str], temperature: float | None = None) -> list[ExplainedRows]:
        """Does what `explain_text` does for several texts, whose tokens are explained in common batches."""
        names = ["text"] if len(texts) == 1 else [f"text {number}" for number in range(len(texts))]
        vocab_size = self.subject.arch.vocab_size
        passages = [read_text(self.tokenizer, vocab_size, *named) for named in zip(texts, names, strict=True)]
        selected = [(passage, picks_of(passage)) for passage in passages]
        by_text = explain_passages(self, selected, Options(temperature=temperature))
        return [ExplainedRows(explained, self.name, self.layer) for explained in by_text]

    def evaluate(
        self,
        out: str | Path,
        texts: Sequence[str] = (),
        files: Sequence[str | Path] = (),
        rows: EvaluatedRows | None = None,
        sections: Sequence[str] = SECTIONS,
        num_activations: int = 256,
        temperature: float = 1.0,
        seed: int = 0,
        bootstrap_samples: int = 2000,
        control_steps: int | None = None,
        corpus: CorpusConfig | None = None,
        reword: DescribeConfig | None = None,
        judge: DescribeConfig | None = None,
        sampled: int | None = None,
    ) -> dict[str, Any]:
        """Runs the suite (docs/evaluation.md) on activations and returns every figure by section and name.

        The activations are read from `texts`, `files` or a `corpus`, or are given as `rows`. Files hold texts (.txt,
        .jsonl, .parquet), or one parquet file holds activations in the reference's layout. Finished parts are stored in
        `out`/evaluation, and the same call continues from them.

        `control_steps` is the number of training steps of each control decoder; 0 trains none. The default is 60 if
        there are at least 128 activations of 4 documents with known texts, else 0. `reword` names a server that rewords
        explanations, `judge` a server that judges whether they are true. `sampled` is the number of activations that
        are explained several times (default 64).

        Raises UserError for an adapted pair, if one of these four arguments belongs to a section that is left out, if
        `sampled` is below 2, and in one of several processes, because all would write the same files.
        """
        self.check_own_subject("eval")
        if (processes := jax.process_count()) > 1:
            raise UserError(f"eval: the suite runs in one process, and this is one of {processes}")
        spelled = lambda name: "sections" if name == "suite" else name  # noqa: E731
        sections = sections_of(sections, spelled)
        check_additions(sections, control_steps or 0, reword is not None, judge is not None, sampled, spelled)
        out = workdir_path(out)
        rewrite = None if reword is None else rewriter(reword, out / "evaluation" / "reworded")
        ask = None if judge is None else rewriter(judge, out / "evaluation" / "judged")
        subject = lambda: self.subject  # noqa: E731
        arch, sizes = self._roles.encoder.arch, Sizes() if sampled is None else Sizes(sampled=sampled)

        def steps_of(rows: EvaluatedRows) -> int:
            return default_steps(sections, rows) if control_steps is None else control_steps

        def say_cost(rows: EvaluatedRows, reading: int) -> None:
            extras = Extras(steps_of(rows), reword is not None, judge is not None)
            say(cost_text(Asked(rows, sizes, seed, sections, extras, reading), arch))

        if rows is None:
            read_from = texts, files, corpus, num_activations, seed
            rows = rows_of(subject, self.layer, self.tokenizer, arch, *read_from, say_cost)
            if len(rows.h) < num_activations:
                say(f"eval: {num_activations} activations were asked for, and the input has {len(rows.h)}")
        else:
            check_rows(rows, self.d_model)
            say_cost(rows, 0)
        pairing = pairing_of(
            self._roles, self._pair, self._trip, subject, temperature, LARGEST_BATCH, self.max_new_tokens
        )
        work = Work(pairing, rows, out, seed, bootstrap_samples, sizes)
        if work.kept.begun:
            say("eval: what an earlier run has done of this is not done again, and takes none of the time above")

        def further_text_controls() -> None:
            trained_controls(work, self._roles, self._pair, steps_of(work.rows))
            rewordings(work, rewrite)

        further = {"text": further_text_controls, "truth": lambda: judged(work, ask)}
        figures = run_suite(work, sections, further)
        figures["suite"] |= {"pair": self.name, "layer": self.layer}
        return figures

    def explain_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        positions: str | Sequence[int] | None = None,
        match: str | None = None,
        span: str | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> ExplainedRows:
        """Explains the tokens of a chat, a list of messages with `role` and `content`, in the model's chat template.

        Parameters and errors are those of `explain_text`. Rows also have the token's `role`, `section` (header,
        content, footer) and `message_index`. `add_generation_prompt` ends the chat with the beginning of an answer.
        """
        vocab_size = self.subject.arch.vocab_size
        passage = read_chat(self.tokenizer, vocab_size, messages, add_generation_prompt=add_generation_prompt)
        picks = picks_of(passage, positions, match, span)
        (explained,) = explain_passages(self, [(passage, picks)], Options(**options))
        return ExplainedRows(explained, self.name, self.layer)

    def corpus(self, path: str | Path | None = None, texts: int = 128) -> Corpus:
        """Reads at most `texts` texts as contexts for `neuron` and `direction`.

        The texts come from the file `path`. Without `path` they come from the run's corpus, or, if there is no run,
        from the package. Raises UserError if no text has two tokens.
        """
        return read_corpus(self, None if path is None else Path(path), texts)

    def neuron(
        self, spec: str, corpus: Corpus | None = None, settings: DirectionSettings | None = None, side: str = "write"
    ) -> DirectionReport:
        """Explains MLP neuron I of block L, given as `spec` "L:I", beside controls.

        With `side` "write", the explained direction is the neuron's output weights; with "gate" or "up", the weights of
        this input. `corpus` (default: `self.corpus()`) has the contexts that are searched. Raises UserError for a
        neuron that does not exist, and for an adapted pair.
        """
        self.check_own_subject("neuron")
        layer, index = parse_neuron(spec, self.subject.arch)
        return explain_neuron(self, layer, index, corpus or self.corpus(), settings, side=side)

    def direction(
        self, direction: str | np.ndarray, corpus: Corpus | None = None, settings: DirectionSettings | None = None
    ) -> DirectionReport:
        """Explains a direction [d] of any length, given as an array or as `FILE.safetensors:KEY[ROW]`, beside controls.

        `corpus` (default: `self.corpus()`) has the contexts that are searched. Raises UserError for a direction of
        another width, and for an adapted pair.
        """
        self.check_own_subject("direction")
        if isinstance(direction, str):
            named = read_direction(direction, self.d_model)
        else:
            named = Direction("direction", self._checked([direction])[0])
        return explain_direction(self, named.name, named.vector, corpus or self.corpus(), settings)

    def steer(
        self,
        source: str | Sequence[Mapping[str, str]],
        edit: str,
        at: str | None = None,
        original: str | Sequence[str] | None = None,
        word: str | None = None,
        pattern: str | None = None,
        settings: steering.SteerSettings | None = None,
    ) -> steering.SteerReport:
        """Steers the subject's continuations of a text or chat by an edited explanation, with controls.

        `edit` is the edited explanation. `original` is the explanation before the edit, or several explanations whose
        mean is taken (default: the encoder's explanation). `at` selects the tokens that are pushed, as positions or a
        phrase (default: the last 8). Continuations that contain `word` or match the regular expression `pattern` are
        counted. Raises UserError for an adapted pair.
        """
        self.check_own_subject("steer")
        passage = read_passage(self.tokenizer, self.subject.arch.vocab_size, source, add_generation_prompt=True)
        counted = steering.compile_pattern(word, pattern)
        return steering.steer(self, passage, parse_at(passage, at, "at"), edit, original, counted, settings)

    def audit(
        self,
        texts: Mapping[str, str | Sequence[Mapping[str, str]]],
        terms: Sequence[str] = (),
        placebo: bool = True,
        every: int = 1,
        seed: int = 0,
    ) -> AuditReport:
        """Finds words and terms in the explanations of texts or chats that the texts themselves do not contain.

        `texts` maps a name to a text or to the messages of a chat. `terms` are counted in explanations and texts. With
        `placebo`, the report compares with the explanations exchanged between texts, for which at least two texts are
        needed. Every `every`-th token is explained.
        """
        if placebo:
            check_several(texts)
        vocab_size = self.subject.arch.vocab_size
        passages = [read_passage(self.tokenizer, vocab_size, source, name) for name, source in texts.items()]
        explanations = explained_passages(self, passages, every)
        placebos = {"permuted": permuted(explanations, seed)} if placebo else {}
        return audit(explanations, {term: term_pattern(term) for term in terms}, placebos)


def _with_adapters(
    encoder: Released,
    decoder: Released,
    protocol: Protocol,
    tokenizer: Any,
    dtype: str,
    mesh: Mesh | None,
    statistics: Callable[[Explainer], Statistics] | None,
    name: str,
) -> NLA:
    """Makes a pair whose adapters share one frozen base with the subject, so that the base is in memory once."""
    adapters = [role.adapters for role in (encoder, decoder) if role.adapters is not None]
    if len(adapters) < 2 or len({(a.base_model, a.rank, a.alpha, a.experts) for a in adapters}) > 1:
        raise UserError(
            f"{decoder.sidecar.path.parent}: should hold adapters of the same base model, rank and scale, and on the "
            f"same layers, as those in {encoder.sidecar.path.parent}"
        )
    av_file, ar_file = adapters
    arch, layer, scale = encoder.arch, decoder.decoder_layer, av_file.alpha / av_file.rank
    encoder_lm, decoder_lm = Encoder(arch, protocol, scale), Decoder(arch, layer, protocol, scale)
    roles = Roles(encoder_lm, decoder_lm, rank=av_file.rank, experts=av_file.experts)
    base = encoder.weights(dtype, mesh)
    trained = {
        "adapters": ar_file.read(arch.truncated(layer + 1)),
        "value_head": decoder.value_head(mesh),
    }
    pair = Pair(base, {"adapters": av_file.read(arch)}, trained)
    stops = stop_ids(encoder.directory, tokenizer)
    subject = lambda: LanguageModel(arch, base, tokenizer, mesh, stops)  # noqa: E731
    return NLA(
        roles,
        pair,
        tokenizer,
        subject,
        encoder.max_new_tokens,
        mesh,
        statistics,
        name,
        subject_name=av_file.base_model,
    )


def _adapted(directory: Path, subject: str, dtype: str, mesh: Mesh | None) -> NLA:
    """Makes a pair that reads another model's activations through the map in `directory`."""
    adapter = read_adapter(directory)
    if subject:
        raise UserError(f"subject: {directory} maps activations of {adapter.model}; it takes no other subject")
    pair = NLA.from_pretrained(adapter.to, dtype=dtype, mesh=mesh)
    if pair.d_model != adapter.matrix.shape[1]:
        raise UserError(f"{directory}: maps to width {adapter.matrix.shape[1]}; {adapter.to} reads {pair.d_model}")
    warn(WARNING)
    return NLA(
        pair._roles,
        pair._pair,
        pair.tokenizer,
        lambda: mapped_subject(directory, adapter, dtype, mesh),
        pair.max_new_tokens,
        mesh,
        statistics=pair._make_statistics,
        name=str(directory),
        subject_name=adapter.model,
        adapter=adapter,
        base_name=pair._base_name,
        reader=load_tokenizer(resolve_model(adapter.model)),
    )
