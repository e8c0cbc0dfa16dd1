#!/usr/bin/env bash
# A pool of three domains and two architectures: Omniglot and MNIST (1x28x28), CIFAR-FS (3x32x32); Conv4, and
# ResNet-10 for half of the Omniglot teachers.
# PURER with a ProtoNet head and FREE with a MAML head learn one learner each from all of it; both are tested on each
# domain and on all episodes together, and so is an untrained network, its step for each domain and shot chosen on more
# episodes. 70 minutes on 2 cores, with the pools there; what is there is gone on with.
# Usage: RAY_DFML_DATA=FOLDER benchmarks/mixed.sh OUT
set -euo pipefail
mkdir -p "$1" && cd "$1"
omniglot=omniglot:$RAY_DFML_DATA/omniglot28.parquet mnist=mnist:$RAY_DFML_DATA/mnist.parquet
cifar=cifar-fs:$RAY_DFML_DATA/cifar100.parquet
build() { [ -e "$1" ] || ray-dfml pool build --out "$@" --workers 2; }
build omniglot --data "$omniglot" --models 6 --arch conv4,resnet10 --seed 0 --set pretrain.epochs=15 \
    --set pretrain.batch=16
build mnist --data "$mnist" --models 3 --arch conv4 --seed 0 --set pretrain.epochs=1
build cifar --data "$cifar" --models 12 --arch conv4 --seed 0 --set pretrain.epochs=8
learn() {
    local method=$1 run=$2
    shift 2
    if [ -e "$run" ]; then
        ray-dfml train "$method" --run-dir "$run" --workers 2 --resume
        return
    fi
    ray-dfml train "$method" --run-dir "$run" --pool omniglot --pool mnist --pool cifar --workers 2 \
        --data "$omniglot" --data "$mnist" --data "$cifar" \
        --set eval.seed=4 --set eval.episodes=600 --set eval.val_episodes=50 "$@"
}
for seed in 0 1; do
    learn purer "purer-$seed" --seed $seed --preset characters-purer --set learner.head=protonet \
        --set method.rounds=50 --set method.image_steps=5 --set method.image_warmup=20 \
        --set method.images_per_class=20 --set method.meta.shot=5 --set method.meta.lr=1e-3 \
        --set method.curriculum_after=100 --set eval.every=50
done
learn free free-0 --preset characters --set method.rounds=24 --set method.images_per_class=16 \
    --set method.replay.lr=1e-3 --set method.replay.max_updates=12 --set method.replay.patience=12 \
    --set eval.every=24 --set eval.shots=[5]
for shot in 1 5; do
    learn random "random-$shot-shot" --set eval.val_episodes=200 --set "eval.shots=[$shot]"
done
ray-dfml report purer-0 purer-1 free-0 random-1-shot random-5-shot --out mixed.md
