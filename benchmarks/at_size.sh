#!/usr/bin/env bash
# CIFAR-FS with 100 Conv4-32 teachers, one process of one thread; at_size_2cores_202611.md. All rows have the
# ProtoNet head. The recipe of the teachers takes a quarter of the epochs of the default one, with equal accuracy.
# Usage: RAY_DFML_DATA=FOLDER benchmarks/at_size.sh OUT SEED ROW...; rows: random average ota no-pool free free-dip free-long
# free-paper free-labels best labelled labelled-QUERIES ten ten-shuffled ten-labels purer bidf-mkd maml-oracle
# maml-oracle-long. OUT/pool-100 is built if it is not there, and the runs are OUT/runs/ROW-SEED.
set -euo pipefail
out=$1 seed=$2 data="cifar-fs:$RAY_DFML_DATA/cifar100.parquet"
ray-dfml pool build --data "$data" --models 100 --arch conv4 --way 5 --seed 0 --out "$out/pool-100" --resume \
  --set pretrain.epochs=15 --set 'pretrain.milestones=[9,13]'
[ -e "$out/pool-10-labels" ] ||
  python "$(dirname "$0")/label_pool.py" "$out/pool-100" "$out/pool-10-labels" 10
same=(--data "$data" --backend local --seed "$seed" --resume-or-start
  --set learner.head=protonet --set eval.episodes=600 --set eval.val_episodes=100)
ten=(--preset best-cifar-fs --set pool.limit=10 --set method.steps=2000 --set method.inversion.images_per_class=80)
free=(--set method.draws=turns --set method.warmup=3 --set method.width=32 --set method.lr_generator=3e-3
  --set method.lr_latent=3e-2 --set method.bn_weight=1.0 --set method.replay.shot=5 --set method.replay.max_updates=10
  --set method.replay.lr=3e-3 --set eval.every=5)
oracle=(--set method.updates_per_round=15 --set method.replay.lr=3e-3)
for row in "${@:3}"; do
  pool=pool-100
  case $row in
    random | average | ota) method=$row settings=() ;;
    no-pool) method=no-pool settings=(--preset no-pool-colour) ;;
    free) method=free settings=("${free[@]}" --set method.rounds=25) ;;
    free-dip) method=free settings=("${free[@]}" --set method.rounds=25 --set 'method.images=[dip]') ;;
    free-long) method=free settings=("${free[@]}" --set method.rounds=75) ;;
    free-paper) method=free settings=(--profile paper --set method.rounds=15 --set method.replay.shot=5
      --set eval.every=5) ;;
    free-labels) method=free pool=pool-10-labels settings=("${free[@]}" --set learner.start=no-pool-colour
      --set method.rounds=15 --set method.surrogate.budget=1500 --set method.surrogate.last_steps=300) ;;
    best) method=shared-answers settings=(--preset best-cifar-fs) ;;
    labelled) method=shared-answers settings=(--preset best-cifar-fs --set method.inversion.images_per_class=0
      --set method.budget=14000 --set method.batch=1400) ;;
    labelled-*) method=shared-answers settings=(--preset best-cifar-fs --set method.inversion.images_per_class=0
      --set method.budget="${row#*-}" --set method.batch=$((${row#*-} / 5)) --set method.steps=1500) ;;
    ten) method=shared-answers settings=("${ten[@]}") ;;
    ten-shuffled) method=shared-answers settings=("${ten[@]}" --set pool.fraction_poisoned=1) ;;
    ten-labels) method=shared-answers pool=pool-10-labels settings=(--preset best-cifar-fs --set method.budget=1500
      --set method.batch=150 --set method.steps=900 --set method.inversion.images_per_class=0) ;;
    purer) method=purer settings=(--set method.rounds=40 --set method.teachers_per_round=10 --set method.bn_weight=1.0
      --set method.image_steps=15 --set method.lr_images=0.1 --set method.tv_weight=1e-3 --set method.meta.lr=3e-3
      --set eval.every=10) ;;
    bidf-mkd) method=bidf-mkd settings=(--set method.rounds=25 --set method.conditional=False --set method.width=32
      --set method.iterations=20 --set method.lr_generator=3e-3 --set method.bn_weight=1.0
      --set method.images_per_class=20 --set method.replay.shot=5 --set method.replay.lr=3e-3 --set eval.every=5) ;;
    maml-oracle) method=maml-oracle settings=("${oracle[@]}" --set method.rounds=20) ;;
    maml-oracle-long) method=maml-oracle settings=("${oracle[@]}" --set method.rounds=100) ;;
    *) echo "no row $row" >&2 && exit 2 ;;
  esac
  ray-dfml train "$method" --pool "$out/$pool" "${same[@]}" "${settings[@]}" --run-dir "$out/runs/$row-$seed"
done
