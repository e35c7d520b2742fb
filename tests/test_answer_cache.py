"""Answers on disk and in a bucket: found again whatever happened in between."""

import json
import os
import resource
import shutil
import stat
import threading

import pytest

from nlae_jax.data import answer_cache
from nlae_jax.data.answer_cache import AnswerCache
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import workdir_path

pytest_plugins = ["tests.fake_gcs"]

TEXTS = [f"text {i}" for i in range(20)]


def fill(cache, texts=TEXTS, mark="answer"):
    for text in texts:
        cache.put(text, f"{mark} to {text}")


def found(directory, texts=TEXTS, **options):
    return AnswerCache(directory, "m", **options).lookup(texts, str)


def expected(texts=TEXTS, mark="answer"):
    return {text: f"{mark} to {text}" for text in texts}


@pytest.fixture(params=["here", "bucket"])
def directory(request, tmp_path):
    """Where answers go: below a directory that is not there, or in an empty bucket."""
    if request.param == "here":
        return tmp_path / "W/activations/answers"
    request.getfixturevalue("gcs")
    return workdir_path("gs://bucket/runs/W") / "activations/answers"


def test_what_was_put_is_found(directory):
    assert found(directory) == {}
    with AnswerCache(directory, "m") as cache:
        fill(cache)
    assert found(directory) == expected()
    assert cache.get(TEXTS[3]) == f"answer to {TEXTS[3]}" and cache.get("another") is None
    assert AnswerCache(directory, "n").get(TEXTS[3]) is None
    assert next(path.name for path in directory.iterdir()).startswith("part-00000-")


def test_later_answers_count_and_some_are_taken_back(directory):
    with AnswerCache(directory, "m") as cache:
        fill(cache)
        cache.withdraw(TEXTS[:5])
        fill(cache, TEXTS[4:5], "second")
    with AnswerCache(directory, "m") as cache:
        fill(cache, TEXTS[:1], "third")
        cache.withdraw(TEXTS[10:])
    assert found(directory) == (
        expected(TEXTS[5:10]) | expected(TEXTS[4:5], "second") | expected(TEXTS[:1], "third")
    )  # fmt: skip
    assert len(list(directory.iterdir())) == 2


def test_what_is_read_of_an_answer_is_chosen(directory):
    with AnswerCache(directory, "m") as cache:
        fill(cache)
    assert AnswerCache(directory, "m").lookup(TEXTS[:2], len) == {text: len(f"answer to {text}") for text in TEXTS[:2]}


def test_odd_texts_and_answers_come_back(directory):
    odd = ["", "\ud800", "a\n\u2028\x85b", '"}{', "\U0001f35e" * 1000]
    with AnswerCache(directory, "m") as cache:
        for text in odd:
            cache.put(text, text.replace("\ud800", "\ufffd"))
    assert found(directory, odd) == {text: text.replace("\ud800", "\ufffd") for text in odd}


def test_answers_move_with_the_workdir(gcs, tmp_path):
    """From here to a bucket and back, added to in each place."""
    remote, here = workdir_path("gs://bucket/W"), tmp_path / "W"
    with AnswerCache(here, "m") as cache:
        fill(cache, TEXTS[:5])
    for path in here.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    with AnswerCache(remote, "m") as cache:
        assert len(cache.lookup(TEXTS, str)) == 5
        fill(cache, TEXTS[5:])
    again = tmp_path / "again"
    again.mkdir()
    for name in gcs.names("W/"):
        (again / name.removeprefix("W/")).write_bytes(gcs.read(name))
    assert found(again) == found(remote) == expected()


# --- here


def test_an_answer_here_is_on_disk_when_put_returns(tmp_path):
    cache = AnswerCache(tmp_path, "m")
    for n, text in enumerate(TEXTS, start=1):
        cache.put(text, "answer")
        assert len(found(tmp_path)) == n  # another reader; nothing was flushed or closed


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_last_line_is_as_never_written(tmp_path, cut, capsys):
    fill(AnswerCache(tmp_path, "m"))
    (part,) = tmp_path.iterdir()
    os.truncate(part, part.stat().st_size - cut)
    assert found(tmp_path) == expected(TEXTS[:-1] if cut > 1 else TEXTS)
    with AnswerCache(tmp_path, "m") as cache:
        fill(cache, TEXTS[-1:])
    assert found(tmp_path) == expected() and len(list(tmp_path.iterdir())) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "line", [b"\x00" * 50, b"[1]", b'{"key": 1, "answer": "x"}', b'{"key": "x"}', b"\xff", b"[" * 9999, b"7", b'"x"']
)
def test_damage_costs_the_damaged_lines(tmp_path, line, capsys):
    fill(AnswerCache(tmp_path, "m"))
    (part,) = tmp_path.iterdir()
    lines = part.read_bytes().splitlines()
    part.write_bytes(b"\n".join([*lines[:3], line, *lines[4:]]) + b"\n")
    assert found(tmp_path) == expected(TEXTS[:3] + TEXTS[4:])
    assert capsys.readouterr().err == f"warning: {part}: 1 damaged lines; their questions are asked again\n"


def test_other_files_are_not_parts(tmp_path):
    fill(AnswerCache(tmp_path, "m"))
    (part,) = tmp_path.iterdir()
    for name in ("notes.txt", ".part-00000-00.jsonl.tmp", "part-x.jsonl"):
        (tmp_path / name).write_bytes(b"garbage\ngarbage\n")
    shutil.copy(part, tmp_path / "part-00007.jsonl")
    part.unlink()
    assert found(tmp_path) == expected()
    with AnswerCache(tmp_path, "m") as cache:
        fill(cache, TEXTS[:1], "newer")
    assert found(tmp_path, TEXTS[:1]) == expected(TEXTS[:1], "newer")


def test_only_the_owner_reads_answers(tmp_path):
    before = os.umask(0o022)
    try:
        with AnswerCache(tmp_path / "W/answers", "m", shared=tmp_path / "shared/answers") as cache:
            fill(cache)
    finally:
        os.umask(before)
    for directory in (tmp_path / "W/answers", tmp_path / "shared/answers"):
        (part,) = directory.iterdir()
        assert stat.S_IMODE(part.stat().st_mode) == 0o600 and stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_two_processes_do_not_write_into_each_others_parts(directory):
    with AnswerCache(directory, "m") as one, AnswerCache(directory, "m") as other:
        for n, text in enumerate(TEXTS):
            (one if n % 2 else other).put(text, f"answer to {text}")
    assert found(directory) == expected() and len(list(directory.iterdir())) == 2


def test_threads_share_a_cache(tmp_path):
    cache = AnswerCache(tmp_path, "m")
    texts = [f"{i}" * 200 for i in range(400)]
    threads = [threading.Thread(target=fill, args=(cache, texts[i::4])) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found(tmp_path, texts) == expected(texts) and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_line_and_tears_nothing(tmp_path):
    """Files may grow by 30 bytes more: half of a line is written."""
    cache = AnswerCache(tmp_path, "m")
    fill(cache, TEXTS[:2])
    (part,) = tmp_path.iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (part.stat().st_size + 30, limits[1]))
    try:
        with pytest.raises(UserError, match="an answer cannot be stored: No space left on device"):
            cache.put(TEXTS[2], "answer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fill(cache, TEXTS[3:])
    assert found(tmp_path) == expected(TEXTS[:2] + TEXTS[3:])


def test_a_place_for_answers_that_is_none(tmp_path):
    (tmp_path / "W").write_text("a file")
    with pytest.raises(UserError, match=r"W: an answer cannot be stored: File exists"):
        AnswerCache(tmp_path / "W", "m").put("text", "answer")


def test_answers_of_the_workdir_that_cannot_be_read_are_not_asked_again(tmp_path):
    (tmp_path / "part-00000-aa.jsonl").mkdir()
    with pytest.raises(UserError, match=r"part-00000-aa.jsonl: answers cannot be read \(Is a directory\)"):
        found(tmp_path)


# --- what workdirs of a machine share


def test_what_one_workdir_asked_another_has(tmp_path):
    shared = tmp_path / "shared"
    with AnswerCache(tmp_path / "a", "m", shared=shared) as cache:
        fill(cache)
        cache.withdraw(TEXTS[:1])
    with AnswerCache(tmp_path / "b", "m", shared=shared) as cache:
        fill(cache, TEXTS[1:2], "own")
        assert cache.lookup(TEXTS, str) == expected(TEXTS[2:]) | expected(TEXTS[1:2], "own")
        assert cache.lookup(TEXTS[:1], str) == {}
    shutil.rmtree(shared)
    assert found(tmp_path / "b") == expected(TEXTS[2:]) | expected(TEXTS[1:2], "own")  # it has them itself by now
    assert AnswerCache(tmp_path / "c", "n", shared=shared).lookup(TEXTS, str) == {}


def test_a_shared_place_that_cannot_be_used_is_done_without(tmp_path, capsys):
    (tmp_path / "shared").write_text("a file")
    (tmp_path / "unreadable/part-00000-aa.jsonl").mkdir(parents=True)
    with AnswerCache(tmp_path / "a", "m", shared=tmp_path / "shared") as cache:
        fill(cache)
    assert capsys.readouterr().err.count("other workdirs will not find this answer") == 1
    assert found(tmp_path / "a") == expected()
    assert found(tmp_path / "b", shared=tmp_path / "unreadable") == {}
    assert found(tmp_path / "c", shared=tmp_path / "shared") == {}


# --- in a bucket


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the cache sees pass."""
    now = [0.0]
    monkeypatch.setattr(answer_cache.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def remote(gcs):
    return workdir_path("gs://bucket/W") / "answers"


def test_an_object_is_written_now_and_then(remote, gcs, clock):
    """By time or by number; in between, a killed process loses no more than that."""
    cache = AnswerCache(remote, "m")
    for n in range(600):
        cache.put(f"text {n}", "answer")
        cache.sync()
    assert len(gcs.uploads) == 2 and len(found(remote, [f"text {n}" for n in range(600)])) == 512
    clock[0] += answer_cache.SYNC_SECONDS
    cache.sync()
    assert len(gcs.uploads) == 3 and len(found(remote, [f"text {n}" for n in range(600)])) == 600
    clock[0] += 100 * answer_cache.SYNC_SECONDS
    cache.sync()
    cache.sync(at_once=True)
    assert len(gcs.uploads) == 3 and len(gcs.names("W/")) == 1  # nothing was new, and the part was not yet full


def test_full_parts_are_left_alone(remote, gcs, monkeypatch):
    monkeypatch.setattr(answer_cache, "_PART_BYTES", 1_000)
    cache = AnswerCache(remote, "m")
    for text in TEXTS:
        cache.put(text, f"answer to {text}")
        cache.sync(at_once=True)
    names = gcs.names("W/")
    assert [int(name.split("-")[1]) for name in names] == list(range(len(names))) and len(names) == 2
    assert found(remote) == expected() and max(size for _, size in gcs.uploads) < 1_200


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, UserError("broken")])
def test_at_every_end_all_is_written(remote, gcs, error):
    def use():
        with AnswerCache(remote, "m") as cache:
            fill(cache)
            assert not gcs.uploads
            if error:
                raise error

    if error:
        with pytest.raises(error if isinstance(error, type) else type(error)):
            use()
    else:
        use()
    assert found(remote) == expected() and len(gcs.uploads) == 1


def test_a_bucket_that_refuses_is_named_and_what_came_before_is_kept(remote, gcs, capsys):
    gcs.refuse_upload = lambda name: 403
    with pytest.raises(UserError, match="these credentials may not write it"), AnswerCache(remote, "m") as cache:
        fill(cache)
    with pytest.raises(KeyError, match="first"), AnswerCache(remote, "m") as cache:
        fill(cache)
        raise KeyError("first")
    assert "the last answers could not be stored" in capsys.readouterr().err
    gcs.refuse_upload = lambda name: 0
    cache.sync(at_once=True)  # nothing was given up
    assert found(remote) == expected()


def test_lines_added_while_an_object_is_written_are_not_lost(remote, gcs, monkeypatch):
    monkeypatch.setattr(answer_cache, "_PART_BYTES", 1)
    cache, late = AnswerCache(remote, "m"), iter(TEXTS[10:])

    def uploading(name):
        if text := next(late, None):
            fill(cache, [text])
        return 0

    gcs.refuse_upload = uploading
    fill(cache, TEXTS[:10])
    for _ in range(11):
        cache.sync(at_once=True)
    assert found(remote) == expected()
    lines = [json.loads(line) for name in gcs.names("W/") for line in gcs.read(name).splitlines()]
    assert len(lines) == 20


def test_answers_of_other_identities_count_until_they_are_withdrawn(tmp_path):
    with AnswerCache(tmp_path, "old") as cache:
        fill(cache)
    cache = AnswerCache(tmp_path, "m", others=[("older",), ("old",)])
    assert cache.lookup(TEXTS, str) == expected() and found(tmp_path) == {}
    with cache:
        fill(cache, TEXTS[:1], "newer answer")
        cache.withdraw(TEXTS[1:2])
    assert cache.lookup(TEXTS[:2], str) == expected(TEXTS[:1], "newer answer")
    assert cache.lookup(TEXTS[2:], str) == expected(TEXTS[2:])
