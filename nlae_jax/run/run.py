"""A run: one config over one workdir, and what its stages share."""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nlae_jax.config import MICROBATCHES, Config, flatten
from nlae_jax.data.activations import ActivationStore
from nlae_jax.data.providers import SERVERS
from nlae_jax.interop.datasets import check_datasets, check_same_prompt, dataset_files, dataset_sidecar
from nlae_jax.interop.released import Released, open_released, pair_sidecar
from nlae_jax.interop.sidecar import Sidecar, combined, protocol_of
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.pretrained import check_same_tokenizer, fingerprint, load_tokenizer, resolve_model
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import batch_parts, make_mesh, place, replicated, tree_shardings
from nlae_jax.roles import direction
from nlae_jax.roles.pair import Params, Roles, make_roles
from nlae_jax.roles.protocol import Protocol, Tails, blank_tokens, check_prompts, kept_protocol, make_protocol, tails
from nlae_jax.roles.views import marks
from nlae_jax.run.workdir import ANY_CHECKPOINT, differs, located, recorded, require
from nlae_jax.runtime import processes, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import (
    AnyPath,
    is_remote,
    read_json,
    read_parquet,
    remove_abandoned,
    write_json,
    write_text,
)
from nlae_jax.runtime.progress import say, warn

# Rows that the FVE denominators of the training metrics are computed from.
_BASELINE_ROWS = 4096


class Purpose(enum.IntEnum):
    """What random numbers are drawn for: each has a seed of its own."""

    ENCODER_SFT = 2
    DECODER_SFT = 3
    RL = 4
    EVAL = 5


class Run:
    """A workdir and what its stages share; heavy things are made when first asked for and once."""

    def __init__(self, config: Config, workdir: AnyPath, read_only: bool = False) -> None:
        """`read_only`: for using what was trained, beside a run that goes on training there if need be."""
        self.config = config = located(config)
        self.workdir, self._read_only = workdir, read_only
        self.announced: set[str] = set()  # what a person has been told once
        self.mesh: Mesh = make_mesh(config.mesh)
        self.directory = resolve_model(config.subject.model)
        self.arch: Arch = read_arch(self.directory)
        if config.subject.layer >= self.arch.num_layers:
            raise UserError(
                f"config.subject.layer: {config.subject.layer} should be from 0 to {self.arch.num_layers - 1} "
                f"for {config.subject.model}"
            )
        require(workdir, "activations/subject.json")
        if (path := workdir / "activations/subject.json").exists() and read_json(path) != self.identity:
            names = ", ".join((config.subject.model, *config.init.names().values()))
            raise UserError(f"{path}: made with other weights than there are now in {names}; bring those back")
        if "weights" in self._record:
            self._check_record("weights", self.identity, "config.subject.model, config.init")
        if read_only:
            return
        check_batches(config, self.mesh)
        check_datasets(config)
        # Found out now rather than after extraction: whether the prompts work with this tokenizer.
        protocol = self._protocol(1.0)
        check_prompts(protocol, self.tokenizer, self.arch.vocab_size)
        closing = protocol.closing
        if config.rl.max_new_tokens <= len(closing):
            raise UserError(
                f"config.rl.max_new_tokens: {config.rl.max_new_tokens} should be more than the "
                f"{len(closing)} tokens of the closing tag"
            )
        described = (workdir / "activations/descriptions.parquet").exists() or config.dataset.rl or not self.warm_start
        if config.describe.provider in SERVERS and not described and world.is_first():  # it asks
            SERVERS[config.describe.provider](config.describe)
        processes.by_first(lambda: self._open(workdir))

    def _open(self, workdir: AnyPath) -> None:
        """Takes the workdir, if its config is the same or may be changed to this one."""
        workdir.mkdir(parents=True, exist_ok=True)
        _lock(workdir)
        remove_abandoned(workdir, "*", "checkpoints/*/*")
        self._restore(workdir / "config.json", "config", write_json)
        self._restore(workdir / "protocol.json", "protocol", write_json)
        require(workdir, "config.json")
        if (workdir / "config.json").exists() and differs(workdir, self.config):
            self.claim()

    def claim(self) -> None:
        """Writes config.json: from here on the workdir belongs to this config."""
        write_json(self.workdir / "config.json", dataclasses.asdict(self.config))

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells the weights that roles start from; adapters mean nothing on others."""
        released = {role: one.identity for role, one in self.released.items()}
        return {"fingerprint": fingerprint(self.directory), **released}

    @cached_property
    def tokenizer(self) -> Any:
        """The subject's; where an encoder is released, its own with its chat template, which must read text alike."""
        subject = load_tokenizer(self.directory)
        tokenizers = {role: load_tokenizer(one.directory) for role, one in self.released.items()}
        for role, tokenizer in tokenizers.items():
            check_same_tokenizer(subject, tokenizer, f"config.init.{role}")
        return tokenizers.get("av", subject)

    @cached_property
    def base(self) -> Params:
        """The subject's weights on the mesh, frozen."""
        shardings = tree_shardings(self.mesh, model_weights(self.arch))
        return load_params(self.directory, self.arch, self.config.subject.dtype, shardings=shardings)

    @cached_property
    def released(self) -> dict[str, Released]:
        """The directories that roles start from instead of the subject: "av", "ar", both or none."""
        released = {role: open_released(name, role) for role, name in self.config.init.names().items()}
        for role, one in released.items():
            if one.layer not in (None, self.config.subject.layer):
                raise UserError(
                    f"config.init.{role}: made for block {one.layer}; subject.layer is {self.config.subject.layer}"
                )
            if one.arch.d_model != self.arch.d_model:
                raise UserError(
                    f"config.init.{role}: activations of width {one.arch.d_model}; the subject's have "
                    f"{self.arch.d_model}"
                )
            self._check_adapters(role, one)
        return released

    def _check_adapters(self, role: str, released: Released) -> None:
        """Adapters go on being trained as they are: on the same base, of the same rank and scale."""
        if (adapters := released.adapters) is None:
            return
        lora = self.config.lora
        for name, found, needed in (("rank", lora.rank, adapters.rank), ("alpha", lora.alpha, adapters.alpha)):
            if found != needed:
                raise UserError(f"config.lora.{name}: {found} should be {needed}, that of {adapters.directory}")
        if fingerprint(released.directory) != fingerprint(self.directory):
            raise UserError(
                f"config.init.{role}: its adapters belong to {adapters.base_model}, which has other weights than "
                f"subject.model = {self.config.subject.model}"
            )

    @cached_property
    def sidecar(self) -> Sidecar | None:
        """Where prompts and slot are laid down: by a released pair, else by a dataset; None for the config's own."""
        files = dataset_files(self.config.dataset)
        data = dataset_sidecar(files, self.arch.d_model, self.config.subject.layer) if files else None
        if "av" in self.released:
            check_same_prompt(self.released["av"].sidecar, data)
        if len(self.released) == 2:
            return pair_sidecar(self.released["av"], self.released["ar"])
        for role, one in self.released.items():
            own = one.sidecar
            return combined(own, data or own) if role == "av" else combined(data or own, own)
        return data

    def start(self, role: str) -> Params:
        """The weights that the role "av" or "ar" starts from: to be trained themselves in all their bits."""
        if role in self.released and self.released[role].adapters is None:
            dtype = self.config.subject.dtype if self.config.lora.rank else "float32"
            return self.released[role].weights(dtype, self.mesh)
        return self.base

    def forget_base(self) -> None:
        """Frees the subject's weights where no role sits on them; asked for again, they are read again."""
        base = self.__dict__.get("base")  # not asked for, which would read them where nothing has yet
        if not any(base is frozen for frozen in self.bases.values()):
            self.__dict__.pop("base", None)

    @cached_property
    def bases(self) -> dict[str, Params]:
        """`base`, the frozen model that adapters sit on, and `decoder_base` where the decoder's sit on another."""
        if not self.config.lora.rank:
            return {"base": {}}
        encoder, decoder = self.start("av"), self.start("ar")
        return {"base": encoder} if encoder is decoder else {"base": encoder, "decoder_base": decoder}

    @cached_property
    def store(self) -> ActivationStore:
        if not (self.workdir / "activations/meta.json").exists():
            raise UserError(f"{self.workdir}: no activations yet; run `nlae extract` (or `nlae train`) first")
        store = ActivationStore(self.workdir / "activations")
        self._check_record("rows", store.plan.digest(), str(self.workdir / "activations/rows.parquet"))
        return store

    def made_with(self) -> dict[str, Any]:
        """What checkpoints of this run are made with: to tell them from those of another, whatever is lost."""
        return {
            "config": dataclasses.asdict(self.config),
            "weights": self.identity,
            "rows": self.store.plan.digest(),
            "protocol": json.loads(self.protocol.to_json()),
        }

    def _restore(self, path: AnyPath, name: str, write: Callable[[AnyPath, Any], None]) -> None:
        """Makes a file that is missing again, if the newest checkpoint says what was in it."""
        if not path.exists() and name in self._record:
            say(f"{path} is missing: made again, as the newest checkpoint has it")
            write(path, self._record[name])

    def _check_record(self, name: str, found: Any, where: str) -> None:
        """Raises UserError where checkpoints were made with other `name` than are `found`."""
        if name in self._record and self._record[name] != found:
            raise UserError(
                f"{where}: other {name} than {self.workdir / 'checkpoints'} was trained with; bring those back, or "
                "delete it to train anew"
            )

    @cached_property
    def _record(self) -> dict[str, Any]:
        """What the newest checkpoint was made with."""
        return recorded(self.workdir)

    def _protocol(self, injection_scale: float) -> Protocol:
        if self.sidecar is not None:
            return protocol_of(self.sidecar, self.tokenizer, self.config.protocol, injection_scale)
        return make_protocol(self.tokenizer, self.config.protocol, injection_scale)

    def _injection_scale(self) -> float:
        """The config's, else the released encoder's, else the dataset's, else what the activations suggest."""
        if scale := self.config.protocol.injection_scale:
            return scale
        if "av" in self.released:
            return self.released["av"].injection_scale
        if self.sidecar is not None and self.sidecar.injection_scale is not None:
            return self.sidecar.injection_scale  # 0: vectors as they are
        return self.store.meta["norm_p75"]

    @cached_property
    def protocol(self) -> Protocol:
        """As the workdir was made with it; made at first, the same by every process."""
        if (path := self.workdir / "protocol.json").exists():
            protocol, recorded_then = kept_protocol(path, self.tokenizer), self._record.get("protocol", {})
            found = json.loads(protocol.to_json())
            # Fields may have been added since.
            self._check_record("protocol", {name: found.get(name) for name in recorded_then}, str(path))
            return protocol
        require(self.workdir, "protocol.json", (ANY_CHECKPOINT,))
        protocol = self._protocol(self._injection_scale())
        if not self._read_only and world.is_first():
            write_text(path, protocol.to_json())
        return protocol

    @cached_property
    def roles(self) -> Roles:
        archs = {role: released.arch for role, released in self.released.items() if released.adapters is None}
        return make_roles(self.config, self.arch, self.protocol, archs.get("av"), archs.get("ar"))

    @property
    def warm_start(self) -> bool:
        """Whether anything learns from descriptions."""
        return self.config.sft.encoder_steps > 0 or self.config.sft.decoder_steps > 0

    @cached_property
    def descriptions(self) -> dict[int, str]:
        """Row number -> description, of the rows that have one."""
        path = self.workdir / "activations/descriptions.parquet"
        if not path.exists():
            raise UserError(f"{self.workdir}: no descriptions yet; run `nlae describe` (or `nlae train`) first")
        again = "delete activations/ to import again" if self.config.dataset.rl else "delete it to describe again"
        table = read_parquet(path, again, ("row", "description"))
        return dict(zip(table["row"].to_pylist(), table["description"].to_pylist(), strict=True))

    @cached_property
    def blank(self) -> np.ndarray:
        return blank_tokens(self.tokenizer, self.roles.encoder.arch.vocab_size)

    @cached_property
    def tails(self) -> Tails | None:
        return tails(self.tokenizer, self.protocol, self.roles.encoder.arch.vocab_size)

    def seed(self, purpose: int) -> int:
        """A number of its own for each purpose, and for each seed: 31 bits."""
        return int(np.random.SeedSequence([self.config.seed, purpose]).generate_state(1)[0] >> 1)

    def key(self, purpose: int) -> jax.Array:
        """The same as a PRNG key."""
        return jax.random.PRNGKey(self.seed(purpose))

    def on_mesh(self, tree: Any) -> Any:
        return place(tree, replicated(self.mesh))

    def frozen(self, split: str) -> Params:
        """What every training step reads and none changes."""
        rows = self.store.plan.rows_of(split)
        # Rows are ordered by their documents' lengths, so a part of them is taken from everywhere.
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, _BASELINE_ROWS).astype(int))]
        denominators = direction.baselines(jnp.asarray(self.store.vectors(rows)))
        tables: Params = {} if self.tails is None else {"tails": self.on_mesh(self.tails)}
        if self.config.views.leading or self.config.views.unquoted:
            tables["marks"] = self.on_mesh(marks(self.tokenizer, self.roles.encoder.arch.vocab_size))
        return {**self.bases, **tables, "baselines": self.on_mesh(denominators)}

    def held_out_rows(self) -> np.ndarray:
        """The rows that evaluation uses, in random order; drawn once, by the seed."""
        rows = self.store.plan.rows_of("held_out")
        return np.random.default_rng([self.config.seed, 1]).permutation(rows)[: self.config.eval.num_activations]


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises UserError where the devices do not divide a batch or a part of it."""
    flat, devices = flatten(dataclasses.asdict(config)), batch_parts(mesh)
    for whole, parts in MICROBATCHES.items():
        if flat[whole] % devices:
            raise UserError(f"config.{whole}: {flat[whole]} should be divisible by mesh data×fsdp = {devices}")
        if flat[whole] // flat[parts] % devices:
            raise UserError(
                f"config.{parts}: {flat[parts]} leave {flat[whole] // flat[parts]} of {whole} at a time, which "
                f"should be divisible by mesh data×fsdp = {devices}"
            )


# Held while the process lives; a notebook may open one workdir several times.
_LOCKS: dict[AnyPath, TextIO] = {}


def _lock(workdir: AnyPath) -> None:
    """Two runs in one workdir would overwrite each other. A bucket has no lock that ends with its process: no lock."""
    if is_remote(workdir):
        return
    path = workdir.resolve() / ".lock"
    if path in _LOCKS:
        return
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--workdir {workdir}: another nlae process is running there") from None
    except OSError as error:  # of many kinds, where a file system that is shared over a network has no locks
        warn(f"--workdir {workdir}: cannot be locked ({error.strerror}); start no second run there")
    _LOCKS[path] = file
