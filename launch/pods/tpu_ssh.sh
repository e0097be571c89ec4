#!/usr/bin/env bash
# A TPU pod slice over plain ssh:  launch/pods/tpu_ssh.sh    and  launch/pods/tpu_ssh.sh stop    which saves
# Creates the slice where there is none or it was preempted, and goes on there. It must run on a machine that stays up.
# See docs/pods.md
set -euo pipefail

NAME=musc
PROJECT=my-project
ZONE=us-west4-a
TYPE=v5litepod-64
VERSION=v2-alpha-tpuv5-lite
NFS=10.0.0.2:/shared  # a Filestore instance in the slice's network
REPOSITORY=https://github.com/me/lm-jax.git
MODEL=/mnt/shared/models/Meta-Llama-3-8B-Instruct
INPUT=/mnt/shared/data/pairs.jsonl
OUTPUT=/mnt/shared/runs/musc
CACHE=/mnt/shared/jax-cache
RESTARTS=100

tpu() {
  gcloud compute tpus tpu-vm "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

everywhere() {
  tpu ssh --worker=all --command="$1"
}

# What an earlier try left running is asked to stop, once: it saves, and frees the chips
stop="pkill -TERM -f '^[^ ]*python[0-9.]* -m launch[.]'; while pgrep -f '^[^ ]*python[0-9.]* -m launch[.]'; do sleep 1; done"
if [[ ${1:-} == stop ]]; then
  everywhere "touch /tmp/stop-musc; $stop"
  exit
fi

prepare="set -e
sudo mkdir -p /mnt/shared
mountpoint -q /mnt/shared || { sudo apt-get install -qy nfs-common; sudo mount -t nfs $NFS /mnt/shared; }
[[ -d lm-jax ]] || git clone -q $REPOSITORY lm-jax
cd lm-jax
[[ -d .venv ]] || python3 -m venv .venv
.venv/bin/pip install -q -e '.[tpu]'"

train="cd lm-jax
export JAX_COMPILATION_CACHE_DIR=$CACHE
.venv/bin/python -m launch.musc_train --config=configs/musc_train.py:llama3_8b \
  --config.model=$MODEL --config.input=$INPUT --config.output=$OUTPUT --stopped_status=75"

for ((try = 0; try <= RESTARTS; try++)); do
  state=$(tpu describe --format='value(state)' 2>/dev/null || echo NONE)
  if [[ $state != NONE && $state != READY && $state != CREATING ]]; then
    tpu delete --quiet || true
    state=NONE
  fi
  if [[ $state == NONE ]]; then
    tpu create --accelerator-type="$TYPE" --version="$VERSION" --spot || { sleep 60; continue; }
  fi
  everywhere "rm -f /tmp/stop-musc; $stop" || { sleep 60; continue; }
  everywhere "$prepare" && everywhere "$train" && exit 0
  if everywhere "[[ -e /tmp/stop-musc ]]" 2>/dev/null; then
    exit 0  # by `tpu_ssh.sh stop`
  fi
  sleep 30
done
echo "error: not done after $RESTARTS restarts; the lines above say why" >&2
exit 1
