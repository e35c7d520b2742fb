#!/usr/bin/env bash
# Makes a TPU VM, installs this checkout on all its workers and trains there until the run is done: a run continues
# where it stopped, also on a new machine if this one was taken away. It follows the run: start it where it can stay.
#   export PROJECT=... ZONE=us-west4-a
#   launch/tpu_vm.sh [--dry-run] NAME v5e:2x4 experiments/qwen2_5_7b.py gs://BUCKET/RUN [--config.field=value ...]
#   launch/tpu_vm.sh [--dry-run] --delete NAME
# CONFIG is a path in this checkout. SPOT=1 takes machines that are cheaper and may be taken away.
set -u
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
cd "$root" || exit 2
need PROJECT ZONE
if [ "${1:-}" = --delete ]; then
    tpus tpu-vm delete "${2:?which one?}" --quiet
    exit
fi
usage="usage: launch/tpu_vm.sh [--dry-run] NAME TOPOLOGY CONFIG gs://BUCKET/RUN [--config.field=value ...]"
name=${1:?$usage}
topology=${2:?$usage}
: "${3:?$usage}" "${4:?$usage}"
shift 2
type=$(accelerator_type "$topology") || exit 2
version=$(runtime_version "$topology")
ready=READY
installed=

state() {
    ask_tpus tpu-vm describe "$name" "--format=value(state)"
}

# A machine that is ready and has this checkout.
prepare() {
    local now
    while now=$(state) && [ "$now" != "$ready" ]; do
        installed=
        case $now in
            "") # not made yet: this waits for it; where there was no answer, it fails
                tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" \
                    --scopes=cloud-platform ${SPOT:+--spot} || return
                break
                ;;
            PREEMPTED | TERMINATED | STOPPED) # taken away
                tpus tpu-vm delete "$name" --quiet || return
                ;;
            *)
                echo "$me: $name is $now" >&2
                sleep "${WAIT:-30}"
                ;;
        esac
    done
    [ -n "$installed" ] || install_on "$name" || return
    installed=1
}

follow "$@"
