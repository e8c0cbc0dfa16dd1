#!/usr/bin/env bash
# Omniglot, 20 Conv4-32 teachers, FREE on two shards, and the baselines on the same episodes. About 45 minutes on 2 cores.
# Usage: RAY_DFML_DATA=FOLDER benchmarks/omniglot.sh OUT
set -euo pipefail
mkdir -p "$1" && cd "$1"
data=omniglot:$RAY_DFML_DATA/omniglot28.parquet
ray-dfml pool build --data "$data" --models 20 --arch conv4 --way 5 --seed 0 --out pool-omniglot --workers 2
ray-dfml train free --preset characters --pool pool-omniglot --data "$data" --run-dir free-omniglot --workers 2 \
    --set method.rounds=44 --set eval.every=11
updates=$(python -c 'import json; print(sum(json.loads(l).get("replay/updates", 0) for l in open("free-omniglot/metrics.jsonl")))')
ray-dfml train maml-oracle --data "$data" --run-dir oracle-omniglot --workers 2 --set method.rounds=$((updates / 10)) \
    --set method.updates_per_round=10 --set method.replay.shot=1 --set eval.every=$((updates / 40))
ray-dfml train average --pool pool-omniglot --data "$data" --run-dir average-omniglot --workers 2
ray-dfml train best-model --pool pool-omniglot --data "$data" --run-dir best-omniglot --workers 2
