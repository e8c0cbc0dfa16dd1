#!/usr/bin/env bash
# CIFAR-FS, 20 Conv4-32 teachers of 5 epochs, FREE on two shards. About 25 minutes on 2 cores.
# Usage: RAY_DFML_DATA=FOLDER benchmarks/cifar_fs.sh OUT
set -euo pipefail
mkdir -p "$1" && cd "$1"
data=cifar-fs:$RAY_DFML_DATA/cifar100.parquet
ray-dfml pool build --data "$data" --models 20 --arch conv4 --way 5 --seed 0 --out pool-cifar --workers 2 \
    --set pretrain.epochs=5
ray-dfml train free --pool pool-cifar --data "$data" --run-dir free-cifar --workers 2 --set method.rounds=16 \
    --set method.warmup=4 --set method.width=32 --set method.lr_generator=3e-3 --set method.lr_latent=3e-2 \
    --set method.lr_meta=2e-3 --set method.bn_weight=1.0 --set method.replay.max_updates=15 \
    --set eval.every=16 --set eval.shots=[5]
