#!/usr/bin/env bash
# Accuracy against queries a teacher: FREE on 20 services of labels, and BiDf-MKD on 20 services of probabilities, all
# from the learner of `no-pool`; no_weights_2cores_202611.md.
# Usage: benchmarks/queries.sh POOL OUT SEED BUDGET...; POOL is `pool build --models 20` of Omniglot; runs in OUT stay.
set -euo pipefail
pool=$1 out=$2 seed=$3 data="omniglot:$RAY_DFML_DATA/omniglot28.parquet"
[ -e "$out/labels" ] || python "$(dirname "$0")/no_weights.py" pools "$pool" "$out"
same=(--data "$data" --backend local --seed "$seed" --set learner.head=protonet --resume-or-start
  --set eval.every=100 --set eval.episodes=200 --set eval.val_episodes=30)
gentle=(--set learner.start=no-pool-characters --set method.learner_update=none --set method.replay.lr=0.001
  --set method.draws=turns --set method.rounds=12)
ray-dfml train no-pool --pool "$out/labels" --preset no-pool-characters "${same[@]}" --run-dir "$out/no-pool-$seed"
ray-dfml train free --pool "$pool" --preset characters "${same[@]}" "${gentle[@]}" --run-dir "$out/weights-$seed"
for budget in "${@:4}"; do
  ray-dfml train free --pool "$out/labels" --preset characters "${same[@]}" "${gentle[@]}" \
    --set method.surrogate.budget="$budget" --set method.surrogate.invert=true \
    --set method.surrogate.last_steps=300 --run-dir "$out/labels-$budget-$seed"
  # a round is four visits of 16,960 queries, so the least is 3,392 queries a teacher
  [ "$budget" -ge 2000 ] && ray-dfml train bidf-mkd --pool "$out/probs" --preset characters-bidf "${same[@]}" \
    --set learner.start=no-pool-characters --set method.replay.lr=0.001 --set method.iterations=5 \
    --set method.rounds=$(((budget * 20 + 33920) / 67840)) --run-dir "$out/bidf-$budget-$seed"
done
