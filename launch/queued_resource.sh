#!/usr/bin/env bash
# The same as tpu_vm.sh by way of Google's queue: asks for a TPU, waits until there is one, installs this checkout on all
# its workers and trains there. What is taken away is asked for again. It follows the run: start it where it can stay.
#   export PROJECT=... ZONE=us-west4-a
#   launch/queued_resource.sh [--dry-run] NAME v5e:2x4 experiments/qwen2_5_7b.py gs://BUCKET/RUN [--config.f=value ...]
#   launch/queued_resource.sh [--dry-run] --delete NAME
# CONFIG is a path in this checkout. SPOT=1 takes machines that are cheaper and may be taken away. Export the keys that the
# config needs too: they are copied to the workers, readable by their user alone (common.sh).
set -u
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
cd "$root" || exit 2
# shellcheck disable=SC2034 # read by on_tpu
ready=ACTIVE gone='FAILED|SUSPENDING|SUSPENDED' made_at_once= # FAILED: it will never be given

state() {
    ask_tpus queued-resources describe "$name" "--format=value(state.state)"
}

create() {
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" \
        --scopes=cloud-platform ${SPOT:+--spot}
}

delete() {
    tpus queued-resources delete "$name" --force --quiet
}

on_tpu "$@"
