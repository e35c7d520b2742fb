"""What the stages of a run share: made once, by the functions here, and changed by none of them.

`open_run` takes a workdir for a config; `prepare` lays the protocol down. Both give plain frozen dataclasses. Two
things in them are read only when asked for, because many commands do without them and they are large: models' weights
(`Weights`; 0.5 GB and 1.7 s for SmolLM2-135M, 140 GB for a 70B) and the table of the activations' documents and rows
(`Run.store`; 0.2 GB and 1.1 s for 100,000 documents).
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nlae_jax.config import Config
from nlae_jax.data.activations import ActivationStore
from nlae_jax.data.providers import SERVERS
from nlae_jax.interop.datasets import check_datasets, check_same_prompt, dataset_files, dataset_sidecar
from nlae_jax.interop.released import Released, open_released, pair_sidecar
from nlae_jax.interop.sidecar import Sidecar, combined, protocol_of
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.pretrained import check_same_tokenizer, fingerprint, load_tokenizer, resolve_model
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import check_batches, make_mesh, place, replicated, tree_shardings
from nlae_jax.roles.pair import Params, Roles, make_roles
from nlae_jax.roles.protocol import Protocol, check_prompts, kept_protocol, make_protocol
from nlae_jax.run.workdir import ANY_CHECKPOINT, check_record, located, recorded, require, take
from nlae_jax.runtime import processes, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, read_json, read_parquet, write_text
from nlae_jax.train.trackers import check_tracker


class Purpose(enum.IntEnum):
    """What random numbers are drawn for: each has a seed of its own."""

    ENCODER_SFT = 2
    DECODER_SFT = 3
    RL = 4
    EVAL = 5


class Weights:
    """Weights of the models that a run starts from, on its mesh; each read when first asked for, and kept."""

    def __init__(self, config: Config, mesh: Mesh, directory: Path, arch: Arch, released: dict[str, Released]) -> None:
        """`directory` and `arch`: the subject's. `released`: models that the roles "av" and "ar" start from instead."""
        self._config, self._mesh, self._directory, self._arch, self._released = config, mesh, directory, arch, released

    @cached_property
    def base(self) -> Params:
        """The subject's, frozen."""
        shardings = tree_shardings(self._mesh, model_weights(self._arch))
        return load_params(self._directory, self._arch, self._config.subject.dtype, shardings=shardings)

    def start(self, role: str) -> Params:
        """Those that the role "av" or "ar" starts from: to be trained themselves in all their bits."""
        if role in self._released and self._released[role].adapters is None:
            dtype = self._config.subject.dtype if self._config.lora.rank else "float32"
            return self._released[role].weights(dtype, self._mesh)
        return self.base

    @cached_property
    def bases(self) -> dict[str, Params]:
        """`base`, the frozen model that adapters sit on, and `decoder_base` where the decoder's sit on another."""
        if not self._config.lora.rank:
            return {"base": {}}
        encoder, decoder = self.start("av"), self.start("ar")
        return {"base": encoder} if encoder is decoder else {"base": encoder, "decoder_base": decoder}

    def forget_base(self) -> None:
        """Frees the subject's weights where no role sits on them; asked for again, they are read again."""
        base = self.__dict__.get("base")  # not asked for, which would read them where nothing has yet
        if not any(base is frozen for frozen in self.bases.values()):
            self.__dict__.pop("base", None)


@dataclasses.dataclass(frozen=True)
class Run:
    """A config over a workdir, as `open_run` has checked them.

    `directory`, `arch` and `tokenizer` are the subject's; where an encoder is released, the tokenizer is its own, with
    its chat template. `released` are the models that the roles "av" and "ar" start from instead of the subject.
    `identity` tells the weights that roles start from: adapters mean nothing on others. `record` is what the newest
    checkpoint was made with.
    """

    config: Config
    workdir: AnyPath
    read_only: bool
    mesh: Mesh
    directory: Path
    arch: Arch
    tokenizer: Any
    released: dict[str, Released]
    identity: dict[str, str]
    record: dict[str, Any]
    weights: Weights
    open_store: Callable[[], ActivationStore]

    @property
    def base(self) -> Params:
        """The subject's weights, read when first asked for."""
        return self.weights.base

    @property
    def store(self) -> ActivationStore:
        """The activations; opened when first asked for, since explaining needs none and they may be gone."""
        return self.open_store()

    def held_out_rows(self, count: int | None = None) -> np.ndarray:
        """The first `count` held-out rows, by default those that evaluation uses; in random order, by the seed."""
        rows = self.store.plan.rows_of("held_out")
        count = self.config.eval.num_activations if count is None else count
        return np.random.default_rng([self.config.seed, 1]).permutation(rows)[:count]

    def seed(self, purpose: int) -> int:
        """A number of its own for each purpose, and for each seed: 31 bits."""
        return int(np.random.SeedSequence([self.config.seed, purpose]).generate_state(1)[0] >> 1)

    def key(self, purpose: int) -> jax.Array:
        """The same as a PRNG key."""
        return jax.random.PRNGKey(self.seed(purpose))

    def on_mesh(self, tree: Any) -> Any:
        """Arrays whole on every device."""
        return place(tree, replicated(self.mesh))


@dataclasses.dataclass(frozen=True)
class PreparedRun(Run):
    """A run whose prompts are laid down: what training, evaluation and use of a pair need."""

    protocol: Protocol
    roles: Roles

    def made_with(self) -> dict[str, Any]:
        """What checkpoints of this run are made with: to tell them from those of another, whatever is lost."""
        return {
            "config": dataclasses.asdict(self.config),
            "weights": self.identity,
            "rows": self.store.plan.digest(),
            "protocol": json.loads(self.protocol.to_json()),
        }


def open_run(config: Config, workdir: AnyPath, read_only: bool = False) -> Run:
    """Checks a config against its models and the workdir, and takes the workdir for it.

    `read_only`: for using what was trained, beside a run that goes on training there if need be. Raises UserError,
    naming field or file, where something does not fit; whatever can be found out before extraction is.
    """
    config = located(config)
    mesh = make_mesh(config.mesh)
    directory = resolve_model(config.subject.model)
    arch = read_arch(directory)
    if config.subject.layer >= arch.num_layers:
        raise UserError(
            f"config.subject.layer: {config.subject.layer} should be from 0 to {arch.num_layers - 1} "
            f"for {config.subject.model}"
        )
    require(workdir, "activations/subject.json")
    record = recorded(workdir)
    released = _open_released(config, directory, arch)
    run = Run(
        config=config,
        workdir=workdir,
        read_only=read_only,
        mesh=mesh,
        directory=directory,
        arch=arch,
        tokenizer=_tokenizer(directory, released),
        released=released,
        identity={"fingerprint": fingerprint(directory), **{role: model.identity for role, model in released.items()}},
        record=record,
        weights=Weights(config, mesh, directory, arch, released),
        open_store=cache(partial(_open_store, workdir, record)),
    )
    _check_identity(run)
    if not read_only:
        check_batches(config, mesh)
        _check_before_extraction(run)
        processes.by_first(lambda: take(workdir, config, run.record))
    return run


def prepare(run: Run) -> PreparedRun:
    """Lays the protocol down, if the workdir has none; then no field of it can be changed any more."""
    protocol = _protocol(run)
    archs = {role: model.arch for role, model in run.released.items() if model.adapters is None}
    roles = make_roles(run.config, run.arch, protocol, archs.get("av"), archs.get("ar"))
    known = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return PreparedRun(**known, protocol=protocol, roles=roles)


def sidecar_of(run: Run) -> Sidecar | None:
    """Where prompts and slot are laid down: by a released pair, else by a dataset; None for the config's own."""
    files, released = dataset_files(run.config.dataset), run.released
    data = dataset_sidecar(files, run.arch.d_model, run.config.subject.layer) if files else None
    if "av" in released:
        check_same_prompt(released["av"].sidecar, data)
    if len(released) == 2:
        return pair_sidecar(released["av"], released["ar"])
    for role, model in released.items():
        theirs = model.sidecar
        return combined(theirs, data or theirs) if role == "av" else combined(data or theirs, theirs)
    return data


def descriptions_of(run: Run) -> dict[int, str]:
    """Row number -> description, of the rows that have one."""
    path = run.workdir / "activations/descriptions.parquet"
    if not path.exists():
        raise UserError(f"{run.workdir}: no descriptions yet; run `nlae describe` (or `nlae train`) first")
    again = "delete activations/ to import again" if run.config.dataset.rl else "delete it to describe again"
    table = read_parquet(path, again, ("row", "description"))
    return dict(zip(table["row"].to_pylist(), table["description"].to_pylist(), strict=True))


def _open_store(workdir: AnyPath, record: dict[str, Any]) -> ActivationStore:
    """Raises UserError where there are no activations, or others than checkpoints were trained with."""
    if not (workdir / "activations/meta.json").exists():
        raise UserError(f"{workdir}: no activations yet; run `nlae extract` (or `nlae train`) first")
    store = ActivationStore(workdir / "activations")
    check_record(record, "rows", store.plan.digest(), str(workdir / "activations/rows.parquet"), workdir)
    return store


def _open_released(config: Config, directory: Path, arch: Arch) -> dict[str, Released]:
    """The directories that roles start from instead of the subject: "av", "ar", both or none."""
    released = {role: open_released(name, role) for role, name in config.init.names().items()}
    for role, model in released.items():
        if model.layer not in (None, config.subject.layer):
            raise UserError(
                f"config.init.{role}: made for block {model.layer}; subject.layer is {config.subject.layer}"
            )
        if model.arch.d_model != arch.d_model:
            raise UserError(
                f"config.init.{role}: activations of width {model.arch.d_model}; the subject's have {arch.d_model}"
            )
        _check_adapters(config, directory, role, model)
    return released


def _check_adapters(config: Config, directory: Path, role: str, released: Released) -> None:
    """Adapters go on being trained as they are: on the same base, of the same rank and scale."""
    if (adapters := released.adapters) is None:
        return
    lora = config.lora
    for name, configured, trained in (("rank", lora.rank, adapters.rank), ("alpha", lora.alpha, adapters.alpha)):
        if configured != trained:
            raise UserError(f"config.lora.{name}: {configured} should be {trained}, that of {adapters.directory}")
    if fingerprint(released.directory) != fingerprint(directory):
        raise UserError(
            f"config.init.{role}: its adapters belong to {adapters.base_model}, which has other weights than "
            f"subject.model = {config.subject.model}"
        )


def _tokenizer(directory: Path, released: dict[str, Released]) -> Any:
    """The subject's; where an encoder is released, its own with its chat template, which must read text alike."""
    subject = load_tokenizer(directory)
    tokenizers = {role: load_tokenizer(model.directory) for role, model in released.items()}
    for role, tokenizer in tokenizers.items():
        check_same_tokenizer(subject, tokenizer, f"config.init.{role}")
    return tokenizers.get("av", subject)


def _check_identity(run: Run) -> None:
    """Raises UserError where activations or checkpoints are of other weights."""
    path, names = (
        run.workdir / "activations/subject.json",
        (run.config.subject.model, *run.config.init.names().values()),
    )
    if path.exists() and read_json(path) != run.identity:
        raise UserError(f"{path}: made with other weights than there are now in {', '.join(names)}; bring those back")
    check_record(run.record, "weights", run.identity, "config.subject.model, config.init", run.workdir)


def _check_before_extraction(run: Run) -> None:
    """What would otherwise be found out after hours: datasets, a tracker, prompts with this tokenizer, a key."""
    config = run.config
    check_datasets(config)
    check_tracker(config.track)
    protocol = _new_protocol(run, sidecar_of(run), 1.0)
    check_prompts(protocol, run.tokenizer, run.arch.vocab_size)
    closing = protocol.closing
    if config.rl.max_new_tokens <= len(closing):
        raise UserError(
            f"config.rl.max_new_tokens: {config.rl.max_new_tokens} should be more than the "
            f"{len(closing)} tokens of the closing tag"
        )
    described = (run.workdir / "activations/descriptions.parquet").exists() or config.dataset.rl
    if config.describe.provider in SERVERS and config.sft.learns and not described and world.is_first():
        SERVERS[config.describe.provider](config.describe)  # it asks


def _protocol(run: Run) -> Protocol:
    """As the workdir was made with it; made at first, the same by every process."""
    if (path := run.workdir / "protocol.json").exists():
        protocol, then = kept_protocol(path, run.tokenizer), run.record.get("protocol", {})
        now = json.loads(protocol.to_json())
        # Fields may have been added since.
        check_record(run.record, "protocol", {name: now.get(name) for name in then}, str(path), run.workdir)
        return protocol
    require(run.workdir, "protocol.json", (ANY_CHECKPOINT,))
    sidecar = sidecar_of(run)
    protocol = _new_protocol(run, sidecar, _injection_scale(run, sidecar))
    if not run.read_only and world.is_first():
        write_text(path, protocol.to_json())
    return protocol


def _new_protocol(run: Run, sidecar: Sidecar | None, injection_scale: float) -> Protocol:
    if sidecar is not None:
        return protocol_of(sidecar, run.tokenizer, run.config.protocol, injection_scale)
    return make_protocol(run.tokenizer, run.config.protocol, injection_scale)


def _injection_scale(run: Run, sidecar: Sidecar | None) -> float:
    """The config's, else the released encoder's, else the dataset's, else what the activations suggest."""
    if scale := run.config.protocol.injection_scale:
        return scale
    if "av" in run.released:
        return run.released["av"].injection_scale
    if sidecar is not None and sidecar.injection_scale is not None:
        return sidecar.injection_scale  # 0: vectors as they are
    return run.store.meta["norm_p75"]
