#!/usr/bin/env bash
# A TPU slice, or several, on a cluster of xpk's:  launch/pods/xpk.sh    from the checkout, which goes into the image
# Stop:  xpk workload delete --workload=musc --cluster=CLUSTER    the processes save. See docs/pods.md
set -euo pipefail

NAME=musc
CLUSTER=my-cluster
PROJECT=my-project
ZONE=us-west4-a
TYPE=v5litepod-64
SLICES=1
IMAGE=python:3.12  # with this project's dependencies, to save their installation at every start
# Of a Filestore instance: xpk storage attach shared --type=gcpfilestore --mount-point=/mnt/shared --auto-mount=true ...
MODEL=/mnt/shared/models/Meta-Llama-3-8B-Instruct
INPUT=/mnt/shared/data/pairs.jsonl
OUTPUT=/mnt/shared/runs/musc
CACHE=/mnt/shared/jax-cache
RESTARTS=100

train="pip install -q -e '.[tpu]' && exec python -m launch.musc_train --config=configs/musc_train.py:llama3_8b \
  --config.model=$MODEL --config.input=$INPUT --config.output=$OUTPUT --stopped_status=75"

# A step, and a save, within the grace period; 75: stopped and saved, as a preemption has it
xpk workload create --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TYPE" --num-slices="$SLICES" --base-docker-image="$IMAGE" --script-dir=. \
  --max-restarts="$RESTARTS" --restart-on-exit-codes=1,75,137,143 --termination-grace-period-seconds=300 \
  --env="JAX_COMPILATION_CACHE_DIR=$CACHE" --command="$train"
