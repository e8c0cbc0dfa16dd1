#!/usr/bin/env bash
# A pool of three domains and two architectures: Omniglot and MNIST (1x28x28), CIFAR-FS (3x32x32); Conv4 and ResNet-10.
# FREE learns one learner from all of it; it is tested on each domain and on all episodes together. About 30 minutes on
# 2 cores. Usage: RAY_DFML_DATA=FOLDER benchmarks/mixed.sh OUT
set -euo pipefail
mkdir -p "$1" && cd "$1"
omniglot=omniglot:$RAY_DFML_DATA/omniglot28.parquet mnist=mnist:$RAY_DFML_DATA/mnist.parquet
cifar=cifar-fs:$RAY_DFML_DATA/cifar100.parquet
build() { [ -e "$1" ] || ray-dfml pool build --out "$@" --workers 2; }
build omniglot --data "$omniglot" --models 8 --arch conv4,resnet10 --seed 0 --set pretrain.epochs=20
build mnist --data "$mnist" --models 4 --arch conv4 --seed 0 --set pretrain.epochs=2
build cifar --data "$cifar" --models 4 --arch conv4 --seed 0 --set pretrain.epochs=10
build cifar-resnet --data "$cifar" --models 2 --arch resnet10 --seed 1 --set pretrain.epochs=3
ray-dfml train free --preset characters --pool omniglot --pool mnist --pool cifar --pool cifar-resnet \
    --data "$omniglot" --data "$mnist" --data "$cifar" --run-dir free-mixed --workers 2 \
    --set method.rounds=24 --set method.steps=4 --set method.images_per_class=16 --set eval.every=24 \
    --set eval.episodes=200 --set eval.val_episodes=30
ray-dfml report free-mixed --out mixed.md
