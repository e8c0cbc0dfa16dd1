#!/usr/bin/env bash
# CIFAR-FS, 20 Conv4-32 teachers of 3 epochs, FREE on two shards. About 10 minutes on 2 idle cores.
# Usage: RAY_DFML_DATA=FOLDER benchmarks/cifar_fs.sh OUT
set -euo pipefail
mkdir -p "$1" && cd "$1"
data=cifar-fs:$RAY_DFML_DATA/cifar100.parquet
ray-dfml pool build --data "$data" --models 20 --arch conv4 --way 5 --seed 0 --out pool-cifar --workers 2 \
    --set pretrain.epochs=3
ray-dfml train free --pool pool-cifar --data "$data" --run-dir free-cifar --workers 2 --set method.rounds=12 \
    --set method.warmup=3 --set method.width=32 --set method.lr_generator=3e-3 --set method.lr_latent=3e-2 \
    --set method.bn_weight=1.0 --set method.replay.shot=1 --set method.replay.max_updates=12 \
    --set eval.every=100 --set eval.val_episodes=20 --set eval.shots=[5] --set eval.episodes=300 \
    --set eval.lrs=[]
