#!/usr/bin/env bash
# Same final weights, bit for bit: local, 1 shard, 2 shards, a shard killed in mid-round, the driver killed and resumed.
# Usage: benchmarks/bits.sh POOL OUT     (POOL: Conv4 teachers, such as benchmarks/methods.py builds;
# about 8 minutes on 2 cores)
set -euo pipefail
pool=$(realpath "$1")
mkdir -p "$2" && cd "$2"
train() {
    run=$1
    shift
    ray-dfml train free --preset characters --pool "$pool" --run-dir "$run" --set method.rounds=4 --set method.warmup=1 \
        --set method.replay.max_updates=4 "$@" > /dev/null 2>> log
}
logged() { [ -f "$1/metrics.jsonl" ] && [ "$(wc -l < "$1/metrics.jsonl")" -ge "$2" ]; }

train local --backend local
train one-shard --backend ray --workers 1
train two-shards --backend ray --workers 2

shards() { { pgrep -f 'ray::Shard' || true; } | sort; }
shards > others
train shard-killed --backend ray --workers 2 &
until logged shard-killed 1; do sleep 0.2; done
sleep 4
victim=$(comm -13 others <(shards) | head -n 1)
kill -9 "$victim"
echo "killed shard process $victim in round $(wc -l < shard-killed/metrics.jsonl)"
wait

train driver-killed --backend ray --workers 2 &
until logged driver-killed 2; do sleep 0.2; done
sleep 3
victim=$(pgrep -f 'ray-dfml train free.*driver-killed' | head -n 1)
kill -9 "$victim"
echo "killed driver process $victim in round $(wc -l < driver-killed/metrics.jsonl)"
wait || true
sleep 5
ray-dfml train free --run-dir driver-killed --backend ray --workers 2 --resume > /dev/null 2>> log
sha256sum {local,one-shard,two-shards,shard-killed,driver-killed}/learner.safetensors | tee sums
[ "$(wc -l < sums)" = 5 ] && [ "$(cut -c1-64 sums | sort -u | wc -l)" = 1 ] && echo "all five equal"
