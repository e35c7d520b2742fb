# shellcheck shell=bash
# What the scripts here share; they source it, and it takes --dry-run off their arguments.
# Keys that the config needs (OPENAI_API_KEY, ANTHROPIC_API_KEY, HF_TOKEN, WANDB_API_KEY) are taken from the environment, by name: their
# values stand in no command, no output and no file that others can read. PYTHON: one that has nlae_jax, to ask which.
# Environment: ATTEMPTS to start after a failure (5), seconds of PAUSE before each (2); local.sh: NLAE, the command to run,
# PORT where processes meet, seconds of GRACE until what was told to end is killed (60).

# shellcheck disable=SC2034 # for those that source this
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
me=launch/$(basename "$0")
dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi

die() {
    echo "$me: $*" >&2
    exit 2
}

# Environment variables that only the user knows.
need() {
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || die "$name is not set: export $name=..."
    done
}

# Names of the variables with the keys that CONFIG needs, into `keys`: find_keys CONFIG WORKDIR [--config.field=value ...].
# Stops where one is missing, unless WORKDIR can be read from here and has what the key is for. Values lose white space
# around them.
find_keys() {
    local python=${PYTHON:-$root/.venv/bin/python} said code=0 name value
    [ -x "$(command -v "$python")" ] || python=python3
    said=$("$python" -m nlae_jax.run.keys "$1" "--workdir=$2" "${@:3}" 2>&1) || code=$?
    case $code in
        0) mapfile -t keys < <(grep -xE '[A-Z_]+' <<<"$said") ;;
        2) echo "${said##*$'\n'}" >&2 && exit 2 ;;
        *) die "$python has no nlae_jax, which knows what keys $1 needs: pip install -e . or export PYTHON=..." ;;
    esac
    for name in ${keys[@]+"${keys[@]}"}; do
        value=${!name}
        value=${value#"${value%%[![:space:]]*}"}
        export "$name=${value%"${value##*[![:space:]]}"}"
    done
}

# A file of this user's alone, removed when the script ends; a dry run makes none.
private_file() {
    file=${TMPDIR:-/tmp}/nlae-keys.XXXXXXXX
    [ -n "$dry_run" ] || file=$(mktemp "$file") || return
    # shellcheck disable=SC2064 # this file
    [ -n "$dry_run" ] || trap "rm -f '$file'" EXIT
}

# The words of a command as a shell would read them back.
quoted() {
    local word line=
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "${line# }"
}

# Runs a command, or prints it.
run() {
    if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# Runs a command until it is done: again whenever it was preempted (75), and after other ends ATTEMPTS times in a row; one
# after more than ten minutes begins a new row.
keep_running() {
    local attempt=1 code=0 began
    while true; do
        code=0 began=$SECONDS
        "$@" || code=$?
        # 0: done. 2: something only a person can put right. 130: stopped by hand.
        case $code in
            0 | 2 | 130) return "$code" ;;
            75) echo "$me: preempted; starting again" >&2 ;;
            *)
                ((SECONDS - began < 600)) || attempt=1
                ((attempt < ${ATTEMPTS:-5})) || return "$code"
                echo "$me: attempt $attempt ended with code $code; starting again" >&2
                attempt=$((attempt + 1))
                ;;
        esac
        sleep "${PAUSE:-2}"
    done
}

# --- Cloud TPU. A topology is written as `nlae plan` does; these say what Google calls it.

# v5p:2x2x4 -> v5p-32: v4 and v5p count cores, two a chip.
accelerator_type() {
    [[ $1 =~ ^(v4|v5e|v5p|v6e):[0-9]+(x[0-9]+){1,2}$ ]] || die "topology $1: should be like v5e:2x4 or v5p:2x2x4"
    local kind=${1%%:*} sizes=${1#*:}
    local chips=$((${sizes//x/*}))
    case $kind in
        v5e) echo "v5litepod-$chips" ;;
        v6e) echo "v6e-$chips" ;;
        *) echo "$kind-$((2 * chips))" ;;
    esac
}

runtime_version() {
    case $1 in
        v4:*) echo tpu-ubuntu2204-base ;;
        v5e:*) echo v2-alpha-tpuv5-lite ;;
        v5p:*) echo v2-alpha-tpuv5 ;;
        v6e:*) echo v2-alpha-tpuv6e ;;
    esac
}

# gcloud compute tpus ... in the user's project and zone.
tpus() {
    run gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE"
}

# The same for a question: its answer, nothing where there is none. A dry run asks nothing, and shows the question.
ask_tpus() {
    local command=(gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE")
    if [ -n "$dry_run" ]; then quoted "${command[@]}" >&2; else "${command[@]}" 2>/dev/null || true; fi
}

# Copies this checkout to every worker of a TPU VM and installs it there. Each step must succeed: a worker may have the
# archive of an earlier time. Git also lists files that are deleted here.
install_on() {
    local archive=${TMPDIR:-/tmp}/nlae-$1.tar.gz
    # shellcheck disable=SC2016 # for the shell that is started
    local present='while IFS= read -rd "" f; do [ ! -e "$f" ] || printf "%s\0" "$f"; done'
    run bash -c "git ls-files -z -co --exclude-standard | $present | tar --null -T - -czf \"\$0\"" "$archive" || return
    tpus tpu-vm scp "$archive" "$1:nlae.tar.gz" --worker=all || return
    # The machines' own Python is 3.10.
    tpus tpu-vm ssh "$1" --worker=all "--command=set -e; mkdir -p nlae; tar xzf nlae.tar.gz -C nlae; cd nlae; \
python3 -m pip install --quiet --user uv; ~/.local/bin/uv venv --quiet --allow-existing --python 3.12; \
~/.local/bin/uv pip install --quiet '.[gcs,hub,tpu]'"
}

# All of a script for a kind of TPU machine, which defines `state`, `create` and `delete` of the machine `name`, and says in
# which state it is `ready`, in which it is `gone` for good, and whether it is there when `create` returns (`made_at_once`).
on_tpu() {
    local usage="usage: $me [--dry-run] NAME TOPOLOGY CONFIG gs://BUCKET/RUN [--config.field=value ...]"
    need PROJECT ZONE
    if [ "${1:-}" = --delete ]; then
        name=${2:?which one?}
        delete
        exit
    fi
    name=${1:?$usage}
    : "${2:?$usage}" "${3:?$usage}" "${4:?$usage}"
    type=$(accelerator_type "$2") || exit 2
    version=$(runtime_version "$2")
    installed=
    shift 2
    find_keys "$@"
    keep_running train_once "$@"
}

# Copies the keys to every worker: a shell reads them there once and removes them (`train_on`).
send_keys() {
    local file code=0
    [ ${#keys[@]} -gt 0 ] || return 0
    private_file || return
    # shellcheck disable=SC2016 # for the shell that is started
    run bash -c 'for name; do printf "export %s=%q\n" "$name" "${!name}"; done >"$0"' "$file" "${keys[@]}" || return
    tpus tpu-vm scp "$file" "$1:nlae-keys" --worker=all || code=$?
    run rm -f "$file"
    return "$code"
}

# A machine that is ready and has this checkout.
# shellcheck disable=SC2154 # ready, gone and made_at_once are the script's
prepare() {
    local now
    while now=$(state) && [ "$now" != "$ready" ]; do
        installed=
        if [ -z "$now" ]; then # not made yet; where there was no answer, this fails
            create || return
            [ -z "$dry_run$made_at_once" ] || break
        elif [[ "|$gone|" == *"|$now|"* ]]; then
            delete || return
        else
            echo "$me: $name is $now" >&2
            sleep "${WAIT:-30}"
        fi
    done
    [ -n "$installed" ] || install_on "$name" || return
    installed=1
}

train_once() {
    local code=0
    prepare || return 1 # gcloud's own codes mean nothing here
    train_on "$name" "$@" || code=$?
    [ "$code" -eq 0 ] || [ "$(state)" = "$ready" ] || code=75
    return "$code"
}

# Trains on every worker of a TPU VM; ends with the first code that is not 0.
train_on() {
    local name=$1 config=$2 workdir=$3 read_keys='' left_behind='^[^ ]*python[^ ]* [^ ]*bin/nlae train'
    shift 3
    send_keys "$name" || return
    [ ${#keys[@]} -eq 0 ] || read_keys='. ./nlae-keys && rm nlae-keys && '
    # What a lost connection has left behind there would hold the chips: it is told to save and waited for. Only commands
    # that begin with a Python are meant: the shell that reads this line has the same words in its own.
    tpus tpu-vm ssh "$name" --worker=all "--command=pkill -f '$left_behind'; \
while pgrep -f '$left_behind' >/dev/null; do sleep 1; done; ${read_keys}cd nlae && exec .venv/bin/nlae train \
$(quoted --config "$config" --workdir "$workdir" --distributed auto "$@")"
}
