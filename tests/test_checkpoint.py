"""Checkpoints: what is saved is what is restored, and damage of any kind falls back to the one before."""

import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nlae_jax.train import checkpoint
from nlae_jax.train.checkpoint import Checkpoints, is_sealed, restore_part

SIZE = 4096


def state_at(step):
    values = np.random.default_rng(step).standard_normal((SIZE,)).astype(np.float32)
    return {"weights": jnp.asarray(values), "step": jnp.asarray(step, jnp.int32), "empty": ()}


def save(directory, *steps, keep=2):
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, state_at(step), {"iterator": {"next": step}})
    checkpoints.close()


def restore(directory, **options):
    checkpoints = Checkpoints(directory, 2)
    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state_at(0)), **options)
    checkpoints.close()
    return restored


def assert_is(restored, step):
    number, state, data = restored
    assert number == step == state["step"]
    np.testing.assert_array_equal(state["weights"], state_at(step)["weights"])
    assert data == {"iterator": {"next": step}}


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def largest(directory):
    return max(files(directory), key=lambda path: path.stat().st_size)


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "new") is None


def test_newest_is_restored_and_older_ones_go(tmp_path, capsys):
    save(tmp_path, 2, 4, 6)
    assert_is(restore(tmp_path), 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6"]
    assert all(is_sealed(tmp_path / name) for name in "46")
    assert capsys.readouterr().err == ""


def truncated(step):
    path = largest(step)
    path.write_bytes(path.read_bytes()[:-1])


def emptied(step):
    largest(step).write_bytes(b"")


def one_bit_flipped(step):
    path = largest(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def missing_file(step):
    largest(step).unlink()


def missing_item(step):
    shutil.rmtree(step / "state")


def unfinished(step):
    (step / "manifest.json").unlink()


def torn_manifest(step):
    (step / "manifest.json").write_bytes((step / "manifest.json").read_bytes()[:40])


def all_but_the_directory(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGE = [
    truncated,
    emptied,
    one_bit_flipped,
    missing_file,
    missing_item,
    unfinished,
    torn_manifest,
    all_but_the_directory,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_passed_over_with_a_warning(tmp_path, capsys, damage):
    save(tmp_path, 2, 4)
    damage(tmp_path / "4")
    assert_is(restore(tmp_path), 2)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert warning.count("\n") == 1
    assert str(tmp_path / "4") in warning
    (aside,) = set_aside(tmp_path)
    assert f"moved to {aside}" in warning
    save(tmp_path, 4)  # training gets there again
    assert_is(restore(tmp_path), 4)


def set_aside(directory):
    return sorted(path.name for path in directory.iterdir() if not path.name.isdecimal())


def content(directory):
    return {path.relative_to(directory): path.read_bytes() for path in files(directory)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_set_aside_as_it_is(tmp_path, damage):
    """A workdir that is still being copied loses nothing: put back and completed, its newest state is there."""
    save(tmp_path, 2, 4)
    whole = shutil.copytree(tmp_path / "4", tmp_path.with_name(f"{tmp_path.name}-whole"))
    damage(tmp_path / "4")
    left = content(tmp_path / "4")
    assert_is(restore(tmp_path), 2)
    (aside,) = set_aside(tmp_path)
    assert aside in ("4.damaged", "4.unfinished")
    assert content(tmp_path / aside) == left
    shutil.copytree(whole, tmp_path / aside, dirs_exist_ok=True)
    (tmp_path / aside).rename(tmp_path / "4")
    assert_is(restore(tmp_path), 4)


def test_what_was_set_aside_has_names_of_its_own_and_stays(tmp_path):
    save(tmp_path, 2, 4)
    for count in (1, 2, 3):
        one_bit_flipped(tmp_path / "4")
        assert_is(restore(tmp_path), 2)
        assert len(set_aside(tmp_path)) == count
        save(tmp_path, 4)
    assert set_aside(tmp_path) == ["4.damaged", "4.damaged-2", "4.damaged-3"]
    assert checkpoint.newest_sealed(tmp_path).name == "4"


def test_what_was_never_finished_goes_when_its_step_is_saved_again(tmp_path):
    save(tmp_path, 2, 4)
    unfinished(tmp_path / "4")
    assert_is(restore(tmp_path), 2)
    assert set_aside(tmp_path) == ["4.unfinished"]
    save(tmp_path, 3)
    assert set_aside(tmp_path) == ["4.unfinished"]
    save(tmp_path, 4)
    assert set_aside(tmp_path) == []


def test_all_that_is_damaged_is_set_aside_with_the_state_before_it(tmp_path, capsys):
    save(tmp_path, 2, 4, keep=3)
    save(tmp_path, 6, keep=3)
    for name in "46":
        one_bit_flipped(tmp_path / name)
    assert_is(restore(tmp_path), 2)
    assert set_aside(tmp_path) == ["4.damaged", "6.damaged"]
    assert capsys.readouterr().err.count("warning: ") == 2


def manifest_of(names):
    return lambda manifest: {name: manifest[name] for name in manifest if name.startswith(names)}


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: [],
        lambda manifest: {},
        lambda manifest: None,
        lambda manifest: "all is well",
        lambda manifest: 1,
        lambda manifest: list(manifest),
        lambda manifest: dict.fromkeys(manifest),
        lambda manifest: dict.fromkeys(manifest, 1),
        lambda manifest: dict.fromkeys(manifest, ""),
        lambda manifest: manifest | {"elsewhere": "00"},
        manifest_of("data/"),
        manifest_of("state/"),
        manifest_of("_CHECKPOINT"),
    ],
)
def test_a_manifest_that_says_nothing_vouches_for_nothing(tmp_path, change):
    save(tmp_path, 2, 4)
    path = tmp_path / "4/manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert part_of(tmp_path / "4") is None
    assert_is(restore(tmp_path), 2)
    assert set_aside(tmp_path) == ["4.damaged"]


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\0", '{"a": ' + "1" * 5000 + "}"])
def test_a_manifest_that_is_no_json(tmp_path, text):
    save(tmp_path, 2, 4)
    (tmp_path / "4/manifest.json").write_text(text)
    assert part_of(tmp_path / "4") is None
    assert_is(restore(tmp_path), 2)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_manifest_that_is_no_file(tmp_path, make):
    save(tmp_path, 2, 4)
    (tmp_path / "4/manifest.json").unlink()
    make(tmp_path / "4/manifest.json")
    assert_is(restore(tmp_path), 2)


def test_files_that_a_manifest_need_not_name(tmp_path):
    """What a file browser leaves beside a checkpoint does it no harm."""
    save(tmp_path, 2, 4)
    (tmp_path / "4/.DS_Store").write_bytes(b"x")
    assert_is(restore(tmp_path), 4)


def test_any_file_may_be_the_damaged_one(tmp_path):
    save(tmp_path / "sound", 2, 4)
    names = [path.relative_to(tmp_path / "sound/4") for path in files(tmp_path / "sound/4")]
    assert len(names) > 5
    for number, name in enumerate(names):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "sound", directory)
        with (directory / "4" / name).open("r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]) if first else b"x")
        assert_is(restore(directory), 2)


def test_damage_everywhere_starts_anew(tmp_path, capsys):
    save(tmp_path, 2, 4)
    for name in "24":
        one_bit_flipped(tmp_path / name)
    assert restore(tmp_path) is None
    assert capsys.readouterr().err.count("warning: ") == 2


def test_a_sound_checkpoint_of_another_shape_is_not_thrown_away(tmp_path):
    save(tmp_path, 2, 4)
    checkpoints = Checkpoints(tmp_path, 2)
    with pytest.raises(Exception, match=r"weights|structure|shape"):
        checkpoints.restore({"other": jnp.zeros(3)})
    checkpoints.close()
    assert_is(restore(tmp_path), 4)


def test_remains_of_a_killed_save_do_no_harm(tmp_path):
    save(tmp_path, 2)
    shutil.copytree(tmp_path / "2", tmp_path / "4.orbax-checkpoint-tmp")
    truncated(tmp_path / "4.orbax-checkpoint-tmp")
    assert_is(restore(tmp_path), 2)
    save(tmp_path, 4)
    assert_is(restore(tmp_path), 4)


def test_finished_save_counts_before_the_next_one_begins(tmp_path):
    """A run killed between two saves must not lose the first."""
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(2, state_at(2), {"iterator": {"next": 2}})
    deadline = time.monotonic() + 120
    while not is_sealed(tmp_path / "2") and time.monotonic() < deadline:
        checkpoints.poll()  # as the loop does after each step
    shutil.copytree(tmp_path, tmp_path.with_name("killed"))
    checkpoints.close()
    assert_is(restore(tmp_path.with_name("killed")), 2)


@pytest.mark.parametrize("size", [1, 1 << 12, 1 << 22])
def test_state_given_to_the_next_step_is_saved_as_it_was(tmp_path, size):
    """On a CPU saving could read the very buffers that the next step overwrites."""
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    first = {"floats": jnp.zeros(size), "whole": jnp.zeros(size, jnp.int32), "scalar": jnp.zeros(())}
    state = advance(first)
    assert first["floats"].is_deleted()  # this step does overwrite what it is given
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3):
        checkpoints.save(step, state, {})
        state = advance(state)
    for _ in range(10):
        state = advance(state)
    jax.block_until_ready(state)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (2, 3):
        _, restored, _ = checkpoints.restore(state, step)
        for name, value in restored.items():
            np.testing.assert_array_equal(value, np.full(state[name].shape, step), err_msg=name)
    checkpoints.close()


def test_restored_onto_another_mesh(tmp_path):
    values = np.arange(64, dtype=np.float32).reshape(8, 8)

    def placed(devices, spec):
        return jax.device_put(values, NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("fsdp",)), spec))

    saved, asked = placed(8, PartitionSpec("fsdp")), placed(2, PartitionSpec(None, "fsdp"))
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, {"w": saved}, {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, 2)
    _, restored, _ = checkpoints.restore({"w": asked})
    checkpoints.close()
    np.testing.assert_array_equal(restored["w"], values)
    assert restored["w"].sharding == asked.sharding


# --- a part of a state


def part_of(directory):
    return restore_part(directory, {"weights": jax.ShapeDtypeStruct((SIZE,), jnp.float32, sharding=on_one_device())})


def on_one_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_a_part_is_restored_alone(tmp_path):
    save(tmp_path, 2)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    part = part_of(tmp_path / "2")
    assert part.keys() == {"weights"}
    np.testing.assert_array_equal(part["weights"], state_at(2)["weights"])
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_part_of_a_damaged_checkpoint(tmp_path, damage):
    save(tmp_path, 2)
    damage(tmp_path / "2")
    assert part_of(tmp_path / "2") is None


def test_no_part_of_nothing(tmp_path):
    assert part_of(tmp_path / "2") is None


def test_a_part_takes_the_sharding_asked_for(tmp_path):
    save(tmp_path, 2)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    part = restore_part(tmp_path / "2", {"weights": jax.ShapeDtypeStruct((SIZE,), jnp.float32, sharding=sharding)})
    assert part["weights"].sharding == sharding
    np.testing.assert_array_equal(part["weights"], state_at(2)["weights"])


def test_a_disk_that_is_too_full_is_noticed_before_saving(tmp_path, monkeypatch):
    enough = checkpoint._MARGIN + 4 * SIZE + 4  # the weights and the number of the step
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough))
    save(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough - 1))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert_is(restore(tmp_path), 2)
