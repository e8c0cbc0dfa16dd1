#!/usr/bin/env bash
# What tasks are made of, where the learner starts, and augmentation: an ablation on validation episodes of CIFAR-FS,
# with ten of the 100 teachers of at_size.sh; sources_2cores_202611.md. Rounds are such that each row takes about 100 s
# of a processor. Usage: RAY_DFML_DATA=FOLDER benchmarks/sources.sh OUT SEED ROW...; rows: no-pool generator dip mixture
# augmented-dip warm-dip bidf-generator bidf-dip. OUT/pool-100 is that of at_size.sh. The runs are OUT/sources/ROW-SEED,
# each with its processor seconds in time.txt and its scores in val.json. Nothing is tested.
set -euo pipefail
out=$1 seed=$2 TIMEFORMAT='%U'
for row in "${@:3}"; do
  run=$out/sources/$row-$seed method=free
  common=(--pool "$out/pool-100" --backend local --seed "$seed" --quiet --set pool.limit=10
    --set learner.head=protonet --set method.replay.shot=5 --set method.replay.lr=3e-3)
  free=(--set method.draws=turns --set method.warmup=1 --set method.width=32 --set method.lr_generator=3e-3
    --set method.lr_latent=3e-2 --set method.bn_weight=1.0 --set method.replay.max_updates=10)
  bidf=(--set method.width=16 --set method.lr_generator=1e-2 --set method.bn_weight=0.1 --set method.iterations=16
    --set method.conditional=off --set method.images_per_class=20 --set method.generate_every=10)
  case $row in
    no-pool) method=no-pool settings=(--preset no-pool-colour --set method.rounds=10) ;;
    generator) settings=("${free[@]}" --set method.rounds=12) ;;
    dip) settings=("${free[@]}" --set method.rounds=15 --set method.images=dip) ;;
    mixture) settings=("${free[@]}" --set method.rounds=13 --set method.images=generator,dip) ;;
    augmented-dip) settings=("${free[@]}" --set method.rounds=15 --set method.images=dip
      --set method.replay.augment=on) ;;
    warm-dip) settings=("${free[@]}" --set method.rounds=8 --set method.images=dip
      --set learner.start=no-pool-colour) ;;
    bidf-generator) method=bidf-mkd settings=("${bidf[@]}" --set method.rounds=5) ;;
    bidf-dip) method=bidf-mkd settings=("${bidf[@]}" --set method.rounds=8 --set method.images=dip) ;;
    *) echo "no row $row" >&2 && exit 2 ;;
  esac
  [ -e "$run/val.json" ] && continue
  rm -rf "$run" && mkdir -p "$out/sources"
  { time ray-dfml train "$method" "${common[@]}" "${settings[@]}" --run-dir "$run" >&2; } 2> "$run.log"
  tail -n 1 "$run.log" > "$run/time.txt"
  ray-dfml evaluate "$run" --data "cifar-fs:$RAY_DFML_DATA/cifar100.parquet" --split val --shot 5 --episodes 300 \
    --quiet --json > "$run/val.part" && mv "$run/val.part" "$run/val.json"
done
