#!/usr/bin/env bash
# The control without teachers, and FREE on a pool of which some teachers are only asked; no_pool_2cores_202611.md.
# Usage: benchmarks/no_pool.sh POOL OUT; POOL is `pool build --models 20` of Omniglot, and OUT gets the runs.
set -euo pipefail
pool=$1 out=$2 data="omniglot:$RAY_DFML_DATA/omniglot28.parquet"
mkdir -p "$out"
python - "$pool" "$out/mixed" <<'PYTHON'
"""The first six teachers: two with weights, two with probabilities, two with labels."""
import shutil, sys, yaml
shutil.copytree(sys.argv[1], sys.argv[2])
content = yaml.safe_load(open(f"{sys.argv[2]}/pool.yaml"))
content["teachers"] = content["teachers"][:6]
for entry, access in zip(content["teachers"], ("weights", "weights", "probs", "probs", "label", "label")):
    entry["access"] = access
yaml.safe_dump(content, open(f"{sys.argv[2]}/pool.yaml", "w"))
PYTHON
same=(--data "$data" --backend local --seed 1 --set learner.head=protonet --set eval.every=10 --set eval.episodes=200)
ray-dfml train no-pool --pool "$out/mixed" --preset no-pool-characters "${same[@]}" --run-dir "$out/no-pool"
ray-dfml train free --pool "$out/mixed" --preset characters "${same[@]}" --run-dir "$out/free" \
  --set method.rounds=8 --set method.draws=turns --set method.surrogate.budget=500 \
  --set method.surrogate.invert=true --set method.surrogate.last_steps=300
ray-dfml report "$out/free" "$out/no-pool"
