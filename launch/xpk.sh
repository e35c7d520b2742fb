#!/usr/bin/env bash
# Trains on a GKE cluster: builds this checkout's image, pushes it and creates a JobSet with xpk, which restarts it.
#   export PROJECT=... ZONE=us-west4-a CLUSTER=... IMAGE=REGISTRY/NAME:TAG
#   launch/xpk.sh [--dry-run] NAME v5e:4x4 experiments/qwen2_5_7b.py gs://BUCKET/RUN [--config.field=value ...]
#   launch/xpk.sh [--dry-run] --delete NAME
# The cluster is one of xpk's (xpk cluster create --tpu-type=...). BUILD=0 takes the image as it is in the registry.
# Keys: xpk knows no Kubernetes secrets and writes them into the JobSet, where all who may read the cluster's pods see them.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
cd "$root"
need PROJECT ZONE CLUSTER
place=("--project=$PROJECT" "--zone=$ZONE" "--cluster=$CLUSTER")
if [ "${1:-}" = --delete ]; then
    run xpk workload delete "${place[@]}" "--workload=${2:?which one?}" --force
    exit
fi
usage="usage: launch/xpk.sh [--dry-run] NAME TOPOLOGY CONFIG gs://BUCKET/RUN [--config.field=value ...]"
name=${1:?$usage}
config=${3:?$usage}
workdir=${4:?$usage}
type=$(accelerator_type "${2:?$usage}")
shift 4
need IMAGE
find_keys "$config" "$workdir" "$@"
environment=()
if [ ${#keys[@]} -gt 0 ]; then
    echo "$me: ${keys[*]}: xpk puts the values into the JobSet, for all who may read the cluster's pods" >&2
    private_file
    # Names alone: xpk takes the values from its environment.
    run bash -c 'printf "%s\n" "$@" >"$0"' "$file" "${keys[@]}"
    environment=("--env-file=$file")
fi
if [ "${BUILD:-1}" != 0 ]; then
    run docker build --tag "$IMAGE" --file launch/Dockerfile .
    run docker push "$IMAGE"
fi
# exec: the signal that announces a preemption goes to what the command starts. Codes above 126 are restarted anyway; 2
# is the user's to put right. Between the signal and the end there is time for what nlae does within 25 seconds.
run xpk workload create "${place[@]}" "--workload=$name" "--tpu-type=$type" "--docker-image=$IMAGE" \
    ${environment[@]+"${environment[@]}"} \
    "--max-restarts=${ATTEMPTS:-100}" --restart-on-exit-codes=1,3-126 --termination-grace-period-seconds=60 \
    "--command=exec nlae train $(quoted --config "$config" --workdir "$workdir" --distributed auto "$@")"
