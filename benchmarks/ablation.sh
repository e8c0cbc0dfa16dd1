#!/usr/bin/env bash
# The rows of papers/ablation.yaml as runs of their own, without Ray; papers_2cores_202611.md.
# Usage: benchmarks/ablation.sh POOL OUT SEED...; POOL is `pool build --models 100` of Omniglot, and runs in OUT stay.
set -euo pipefail
pool=$1 out=$2
for seed in "${@:3}"; do
  for row in free baseline erm sequence free_2 hard-label; do
    preset=(); [ $row = free ] || preset=(--preset $row)
    ray-dfml train free --pool "$pool" --data "omniglot:$RAY_DFML_DATA/omniglot28.parquet" --backend local \
      --seed "$seed" "${preset[@]}" --run-dir "$out/$row-$seed" --resume-or-start --set learner.head=protonet \
      --set method.rounds=25 --set method.draws=turns --set method.warmup=2 --set method.width=16 \
      --set method.crop_pad=2 --set method.lr_generator=0.01 --set method.lr_latent=0.1 --set method.lr_meta=0.002 \
      --set method.bn_weight=1 --set method.replay.shot=1 --set method.replay.tasks=4 \
      --set method.replay.inner_lr=0.1 --set method.replay.lr=0.003 --set method.replay.max_updates=10 \
      --set eval.every=25 --set eval.shots=[1,5] --set eval.episodes=200 --set eval.val_episodes=40 --set eval.lr=0.1
  done
done
