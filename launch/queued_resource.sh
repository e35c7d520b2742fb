#!/usr/bin/env bash
# The same as tpu_vm.sh by way of Google's queue: asks for a TPU, waits until there is one, installs this checkout on all
# its workers and trains there. What is taken away is asked for again. It follows the run: start it where it can stay.
#   export PROJECT=... ZONE=us-west4-a
#   launch/queued_resource.sh [--dry-run] NAME v5e:2x4 experiments/qwen2_5_7b.py gs://BUCKET/RUN [--config.f=value ...]
#   launch/queued_resource.sh [--dry-run] --delete NAME
# CONFIG is a path in this checkout. SPOT=1 takes machines that are cheaper and may be taken away.
set -u
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
cd "$root" || exit 2
need PROJECT ZONE
if [ "${1:-}" = --delete ]; then
    tpus queued-resources delete "${2:?which one?}" --force --quiet
    exit
fi
usage="usage: launch/queued_resource.sh [--dry-run] NAME TOPOLOGY CONFIG gs://BUCKET/RUN [--config.field=value ...]"
name=${1:?$usage}
topology=${2:?$usage}
: "${3:?$usage}" "${4:?$usage}"
shift 2
type=$(accelerator_type "$topology") || exit 2
version=$(runtime_version "$topology")
ready=ACTIVE
installed=

state() {
    ask_tpus queued-resources describe "$name" "--format=value(state.state)"
}

# A machine that is there and has this checkout.
prepare() {
    local now
    while now=$(state) && [ "$now" != "$ready" ]; do
        installed=
        case $now in
            "") # not asked for yet
                tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
                    "--runtime-version=$version" --scopes=cloud-platform ${SPOT:+--spot} || return
                [ -z "$dry_run" ] || break
                ;;
            FAILED | SUSPENDING | SUSPENDED) # it will never be given, or was taken away
                tpus queued-resources delete "$name" --force --quiet || return
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
