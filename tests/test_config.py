"""The configuration: every mistake is one line that names the field, and what is written is what is read."""

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.config import (
    Binds,
    Config,
    default_config,
    flatten,
    leaves,
    load_config,
    load_experiment,
    resolve,
)
from nlae_jax.lm.families import read_arch
from nlae_jax.runtime.errors import UserError

LEAVES = {leaf.name: leaf for leaf in leaves()}
FIELDS = {leaf.name: leaf.kind for leaf in leaves()}
NUMBERS = sorted(name for name, kind in FIELDS.items() if kind in (int, float))
TEXTS = sorted(name for name, kind in FIELDS.items() if kind is str)
OPTIONAL = sorted(leaf.name for leaf in leaves() if leaf.option.zero_is_none)


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment file whose get_config() has this body, after `config = default_config()`."""

    def write(body="", returned="config"):
        path = tmp_path / "experiment.py"
        lines = ["config = default_config()", *body.splitlines(), f"return {returned}"]
        text = "".join(f"    {line}\n" for line in lines)
        path.write_text(f"from nlae_jax.config import default_config\n\n\ndef get_config():\n{text}")
        return str(path)

    return write


def complaint(call):
    """The one line of the UserError that `call` raises."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_a_valid_config():
    assert resolve({}) == Config() == resolve(flatten(default_config().to_dict()))


def test_experiment_and_overrides_in_order(experiment):
    path = experiment("config.rl.num_steps = 7\nconfig.lora.rank = 3")
    config = load_experiment(path, ["lora.rank=0", "rl.num_steps=9", "rl.num_steps=11"])
    assert config.rl.num_steps == 11  # the last one counts
    assert config.lora.rank == 0
    assert config.sft == Config().sft


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("rl.kl_coef=1", 1.0),
        ("rl.kl_coef=1e-3", 0.001),
        ("rl.fused=False", False),
        ("rl.fused=true", True),
        ("mesh.data=-1", -1),
        ("corpus.path=", ""),
        ("corpus.path=a=b", "a=b"),
        ("corpus.path=1e3", "1e3"),
        ("describe.model=1.10", "1.10"),
        ("subject.model=True", "True"),
    ],
)
def test_overrides_take_the_type_of_their_field(experiment, override, value):
    loaded = flatten(dataclasses.asdict(load_experiment(experiment(), [override])))[override.partition("=")[0]]
    assert loaded == value
    assert type(loaded) is type(value)


@given(st.sampled_from(TEXTS), st.text(min_size=1))
def test_a_text_override_is_taken_as_it_stands(name, text):
    if LEAVES[name].option.choices or name == "describe.base_url":
        return  # one of a few words; an address
    path = Path(__file__).parent.parent / "experiments/tiny.py"
    assert flatten(dataclasses.asdict(load_experiment(str(path), [f"{name}={text}"])))[name] == text


@pytest.mark.parametrize(
    ("name", "meant"),
    [("rl.num_step", "rl.num_steps"), ("lora.rnak", "lora.rank"), ("sede", "seed"), ("subject.modle", "subject.model")],
)
def test_unknown_field_is_named_with_the_likely_one(experiment, name, meant):
    message = complaint(lambda: load_experiment(experiment(), [f"{name}=1"]))
    assert message.startswith(f"config.{name}:")
    assert message.endswith(f"did you mean {meant}?")


def test_a_section_is_no_field(experiment):
    assert complaint(lambda: load_experiment(experiment(), ["rl=5"])).startswith("config.rl: no such field")


@pytest.mark.parametrize(
    "override", ["seed=a", "seed=1.0", "seed=True", "rl.fused=1", "rl.kl_coef=[1]", "rl.kl_coef=", "lora.rank=None"]
)
def test_mistyped_override_names_field_and_type(experiment, override):
    name = override.partition("=")[0]
    message = complaint(lambda: load_experiment(experiment(), [override]))
    assert message.startswith(f"config.{name}:")
    assert FIELDS[name].__name__ in message


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("text", ["None", "0", "0.0"])
def test_nothing_is_none_and_so_is_the_zero_that_stood_for_it(experiment, tmp_path, name, text):
    """In an override, an experiment, and the config.json of a run that was begun before."""
    assert OPTIONAL == ["corpus.max_documents", "protocol.injection_scale"]
    written = flatten(json.loads(json.dumps(dataclasses.asdict(Config()))))
    assert written[name] is None and resolve(written) == Config()
    assert load_experiment(experiment(), [f"{name}={text}"]) == Config()
    assert load_experiment(experiment(f"config.{name} = {text}")) == Config()
    section, _, field = name.partition(".")
    (tmp_path / "config.json").write_text(json.dumps({section: {field: json.loads(text.replace("None", "null"))}}))
    assert load_config(tmp_path / "config.json") == Config()


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("text", ["False", "''", "-1", "all", "nan"])
def test_what_is_not_nothing_is_no_none(experiment, name, text):
    assert complaint(lambda: load_experiment(experiment(), [f"{name}={text}"])).startswith(f"config.{name}:")


def test_an_experiment_inherits_from_a_file_beside_it(experiment, tmp_path, monkeypatch):
    """Whatever directory the command is given from, and over two generations."""
    parent = Path(experiment("config.rl.num_steps = 7\nconfig.lora.rank = 3"))
    parent.rename(tmp_path / "grandparent.py")
    inherits = (
        "from nlae_jax.config import inherit\n\n\ndef get_config():\n    config = inherit({!r}, beside=__file__)\n"
    )
    (tmp_path / "parent.py").write_text(
        f"{inherits.format('grandparent.py')}    config.lora.rank = 5\n    return config\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/child.py").write_text(f"{inherits.format('../parent.py')}    config.seed = 9\n    return config\n")
    (tmp_path / "elsewhere").mkdir()
    for directory, path in ((tmp_path, "sub/child.py"), (tmp_path / "elsewhere", "../sub/child.py")):
        monkeypatch.chdir(directory)
        config = load_experiment(path)
        assert (config.rl.num_steps, config.lora.rank, config.seed) == (7, 5, 9)
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_parent_that_is_missing_or_wrong_is_named(experiment, tmp_path):
    child = experiment()
    for parent, says in (("none.py", "none.py"), ("wrong.py", "wrong.py: has no get_config()")):
        Path(child).write_text(
            "from nlae_jax.config import inherit\n\n\ndef get_config():\n"
            f"    return inherit({parent!r}, beside=__file__)\n"
        )
        (tmp_path / "wrong.py").write_text("seed = 1\n")
        assert says in complaint(lambda: load_experiment(child))


@pytest.mark.parametrize(
    ("name", "binds"),
    [
        ("seed", Binds.CONFIG),
        ("split.rl", Binds.CONFIG),
        ("describe.provider", Binds.CONFIG),
        ("describe.model", Binds.DESCRIPTIONS),
        ("eval.num_activations", Binds.DESCRIPTIONS),
        ("protocol.injection_scale", Binds.PROTOCOL),
        ("lora.rank", Binds.ENCODER_SFT),
        ("lora.experts", Binds.ENCODER_SFT),
        ("sft.buckets", Binds.ENCODER_SFT),
        ("sft.decoder_learning_rate", Binds.DECODER_SFT),
        ("views.leading", Binds.DECODER_SFT),
        ("rl.kl_coef", Binds.RL),
        ("eval.temperature", Binds.EVAL),
        ("rl.fused", Binds.NEVER),
        ("sft.microbatches", Binds.NEVER),
        ("mesh.tensor", Binds.NEVER),
    ],
)
def test_when_a_field_binds_a_workdir(name, binds):
    assert LEAVES[name].binds is binds


def test_override_without_value(experiment):
    assert complaint(lambda: load_experiment(experiment(), ["seed"])).startswith("--config.seed:")


@pytest.mark.parametrize(
    "body",
    ["config.rl.num_stepz = 5", "config.rl.num_steps = 'many'", "config.nothing.there = 1", "1 / 0", "import no_such"],
)
def test_a_mistake_in_the_experiment_names_the_file(experiment, body):
    path = experiment(body)
    assert complaint(lambda: load_experiment(path)).startswith(f"--config {path}:")


def test_a_field_that_the_experiment_misspells_is_named(experiment):
    assert "num_stepz" in complaint(lambda: load_experiment(experiment("config.rl.num_stepz = 5")))


@pytest.mark.parametrize("returned", ["None", "{'seed': 1}", "default_config"])
def test_get_config_must_return_a_config(experiment, returned):
    path = experiment(returned=returned)
    assert complaint(lambda: load_experiment(path)).startswith(f"--config {path}: get_config() returned")


@pytest.mark.parametrize("text", ["", "x = 1", "def get_config(:", "get_config = 3", "\0"])
def test_a_file_that_is_no_experiment(tmp_path, text):
    path = tmp_path / "file.py"
    path.write_text(text)
    assert str(path) in complaint(lambda: load_experiment(str(path)))


def test_missing_experiment(tmp_path):
    assert str(tmp_path / "no.py") in complaint(lambda: load_experiment(str(tmp_path / "no.py")))
    assert str(tmp_path) in complaint(lambda: load_experiment(str(tmp_path)))


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "seed=2147483648",
        "subject.layer=-1",
        "extract.positions_per_document=0",
        "extract.min_position=0",
        "extract.min_position=512",
        "describe.timeout_seconds=0",
        "sft.batch_size=0",
        "sft.encoder_learning_rate=-1e-5",
        "sft.warmup_fraction=1.5",
        "rl.samples_per_activation=1",
        "rl.kl_coef=-0.1",
        "rl.kl_coef=1e999",
        "optimizer.b2=1.0",
        "optimizer.max_grad_norm=0",
        "checkpoint.every_steps=0",
        "checkpoint.keep=1",
        "eval.num_activations=1",
        "lora.alpha=0",
        "remat=all",
        "subject.dtype=float64",
        "describe.provider=nobody",
        "rl.reward=mse",
        "rl.microbatches=0",
        "rl.microbatches=3",
        "sft.microbatches=0",
        "sft.microbatches=5",
        "optimizer.moment_dtype=float16",
    ],
)
def test_senseless_values_name_their_field(experiment, override):
    name = override.partition("=")[0]
    assert complaint(lambda: load_experiment(experiment(), [override])).startswith(f"config.{name}: ")


@pytest.mark.parametrize("moment", ["b1", "b2"])
def test_a_slow_moment_is_kept_in_all_its_bits(moment):
    slow = {f"optimizer.{moment}": 0.99}
    assert resolve(slow)
    message = complaint(lambda: resolve({**slow, "optimizer.moment_dtype": "bfloat16"}))
    assert message.startswith(f"config.optimizer.{moment}: ") and "optimizer.moment_dtype" in message


@given(st.sampled_from(NUMBERS), st.integers(-3, 3) | st.floats(-2, 2) | st.just(float("nan")))
def test_no_number_ends_in_anything_but_a_config_or_one_line(name, value):
    try:
        config = resolve({name: value})
    except UserError as error:
        assert name.partition(".")[0] in str(error)
        assert "\n" not in str(error)
    else:
        assert flatten(dataclasses.asdict(config))[name] == value


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5, 0.5), (1.0, 0.0, 0.0, 0.0), (0.6, 0.6, -0.4, 0.2)])
def test_split_shares_add_up(shares):
    names = ("encoder_sft", "decoder_sft", "rl", "held_out")
    values = {f"split.{name}": share for name, share in zip(names, shares, strict=True)}
    assert complaint(lambda: resolve(values)).startswith("config.split")


@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 99),
            "rl.kl_coef": st.floats(0, 9, width=32, allow_subnormal=False),
            "corpus.path": st.text(),
        }
    )
)
def test_written_config_is_read_back(values):
    config = resolve(values)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        path.write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
        assert load_config(path) == config


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"rl": 5}', '{"rl": {"num_stepz": 5}}', '{"seed": "a"}'])
def test_damaged_config_json_names_the_file(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert complaint(lambda: load_config(path)).startswith(f"{path}: ")


def test_config_json_that_is_nested_deeper_than_python_can_follow_names_the_file(tmp_path, monkeypatch):
    """Python 3.12 parses JSON deeper than its own functions may call each other."""
    deep: dict[str, object] = {}
    for _ in range(5_000):
        deep = {"a": deep}
    monkeypatch.setattr("nlae_jax.config.read_json", lambda path: deep)
    assert complaint(lambda: load_config(tmp_path / "config.json")) == (
        f"{tmp_path / 'config.json'}: nested too deeply; it should be as the run wrote it"
    )


def test_default_config_refuses_unknown_fields():
    config = default_config()
    with pytest.raises(AttributeError):
        config.rl.num_stepz = 1
    with pytest.raises(TypeError):
        config.seed = "one"


EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# Blocks that are read: two thirds of the depth or, in Gemma 4, a block with full attention near it; and those of the
# released pairs.
LAYERS = {
    "smollm2_135m": 20,
    "qwen2_5_0_5b": 16,
    "qwen2_5_7b": 20,
    "qwen3_8b": 24,
    "gemma3_12b": 32,
    "gemma3_27b": 41,
    "llama3_3_70b": 53,
    "gpt_oss_20b": 16,
    "qwen3_6_27b": 43,
    "gemma4_26b_a4b": 17,
}


@pytest.mark.parametrize("name", LAYERS)
def test_experiments_say_what_they_are(name):
    path = EXPERIMENTS / f"{name}.py"
    config = load_experiment(str(path))
    assert config.subject.layer == LAYERS[name]
    assert config.protocol.injection_scale is None  # measured from the data
    text = path.read_text(encoding="utf-8").split('"""')[1]
    assert f"nlae train --config experiments/{name}.py --workdir runs/{name}" in text
    assert "Hardware: " in text
    assert "Expected" in text


def test_the_decoder_of_gemma_4_can_be_exported():
    """transformers takes every last block for one with full attention; `run.export` refuses others."""
    arch = read_arch(EXPERIMENTS / "architectures/gemma-4-26B-A4B-it")
    assert arch.mixers[LAYERS["gemma4_26b_a4b"]] == "global"


def test_every_experiment_is_known():
    assert {path.stem for path in EXPERIMENTS.glob("*.py")} == {*LAYERS, "bench", "quickstart", "scratch", "tiny"}


@pytest.mark.parametrize(
    "override",
    [
        "rl.kl_coef=1" + "0" * 400,  # beyond float64
        "rl.kl_coef=1e60",  # beyond float32, which would make it infinite
        "rl.temperature=1e-60",  # float32 would make it 0, and 0 is greedy
        "protocol.injection_scale=1e-60",  # 0 there is another scale altogether
        "lora.alpha=-1e60",
        "rl.num_steps=1" + "0" * 30,
        "sft.batch_size=3000000000",
        "sft.buckets=2147483647",  # as many quantiles were computed
        "describe.concurrency=2147483647",
        "eval.bootstrap_samples=2147483647",
        "seed=0x" + "f" * 5000,  # a number that Python does not print
        "rl.num_steps={[]: 1}",
        "rl.num_steps=" + "-" * 9000 + "1",
        "rl.num_steps=" + "(" * 9000,
    ],
)
def test_numbers_and_literals_that_no_field_can_hold(experiment, override):
    name = override.partition("=")[0]
    assert f"config.{name}: " in complaint(lambda: load_experiment(experiment(), [override]))


def test_the_extremes_of_float32_and_int32_are_numbers():
    values = {"rl.kl_coef": 3.4e38, "rl.temperature": 1.2e-38, "rl.num_steps": 2**31 - 1, "rl.length_penalty": 0}
    config = resolve(values)
    assert [config.rl.kl_coef, config.rl.temperature, config.rl.num_steps] == [3.4e38, 1.2e-38, 2**31 - 1]


@pytest.mark.parametrize(
    "body, problem",
    [
        ("import ml_collections\nconfig.seed = ml_collections.config_dict.required_placeholder(int)", "Required"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_an_experiment_that_cannot_be_finished_is_named(experiment, body, problem):
    path = experiment(body)
    message = complaint(lambda: load_experiment(path))
    assert path in message and problem in message


def test_a_field_that_is_named_by_a_number(experiment):
    assert "config.1: no such field" in complaint(lambda: load_experiment(experiment(returned="type(config)({1: 2})")))


@pytest.mark.parametrize(
    "address",
    ["localhost:8000", "http://[::1", "http://h:99999/v1", "http://h:0", "https://me:key@h/v1", "http://h/v1?key=k"],
)
def test_a_server_address_is_checked_when_the_config_is_read(address):
    message = complaint(lambda: resolve({"describe.base_url": address}))
    assert message.startswith("config.describe.base_url: must look like") and "key@" not in message
