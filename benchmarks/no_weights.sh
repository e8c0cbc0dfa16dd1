#!/usr/bin/env bash
# FREE on a pool of which ten teachers give weights, five probabilities and five labels, from a learner that has learned
# from no teacher, and the control beside it; no_weights_2cores_202611.md.
# Usage: benchmarks/no_weights.sh POOL OUT; POOL is `pool build --models 20` of Omniglot, and OUT gets pools and runs.
set -euo pipefail
pool=$1 out=$2 data="omniglot:$RAY_DFML_DATA/omniglot28.parquet"
[ -e "$out/mixed" ] || python "$(dirname "$0")/no_weights.py" pools "$pool" "$out"
same=(--pool "$out/mixed" --data "$data" --backend local --seed 1 --set learner.head=protonet
  --set eval.every=100 --set eval.episodes=200 --set eval.val_episodes=30)
ray-dfml train free "${same[@]}" --preset characters --run-dir "$out/mixed-1" \
  --set learner.start=no-pool-characters --set method.draws=turns --set method.rounds=12 \
  --set method.surrogate.budget=1000 --set method.surrogate.invert=true --set method.surrogate.last_steps=300
ray-dfml train no-pool "${same[@]}" --preset no-pool-characters --run-dir "$out/control-1"
ray-dfml report "$out/mixed-1" "$out/control-1"
