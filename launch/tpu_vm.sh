#!/usr/bin/env bash
# Makes a TPU VM, installs this checkout on all its workers and trains there until the run is done: a run continues
# where it stopped, also on a new machine if this one was taken away. It follows the run: start it where it can stay.
#   export PROJECT=... ZONE=us-west4-a
#   launch/tpu_vm.sh [--dry-run] NAME v5e:2x4 experiments/qwen2_5_7b.py gs://BUCKET/RUN [--config.field=value ...]
#   launch/tpu_vm.sh [--dry-run] --delete NAME
# CONFIG is a path in this checkout. SPOT=1 takes machines that are cheaper and may be taken away. Export the keys that the
# config needs too: they are copied to the workers, readable by their user alone (common.sh).
set -u
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
cd "$root" || exit 2
# shellcheck disable=SC2034 # read by on_tpu
ready=READY gone='PREEMPTED|TERMINATED|STOPPED' made_at_once=1

state() {
    ask_tpus tpu-vm describe "$name" "--format=value(state)"
}

create() {
    tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" --scopes=cloud-platform ${SPOT:+--spot}
}

delete() {
    tpus tpu-vm delete "$name" --quiet
}

on_tpu "$@"
