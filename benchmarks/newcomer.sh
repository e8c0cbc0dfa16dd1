#!/usr/bin/env bash
# A newcomer's path from a clone to a report, timed: README's commands in a clone and an environment of their own.
# newcomer_2cores_202611.md. Needs the package registries and 7 GB of disk; leaves nothing behind.
# Usage: benchmarks/newcomer.sh
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd) work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
step() {
  local began=$SECONDS
  echo "+ ${*:2}"
  "${@:2}" > "$work/log" 2>&1 || { tail -n 30 "$work/log" && exit 1; }
  echo "$1: $((SECONDS - began)) s"
}
unset PYTHONPATH
step clone git clone --quiet "$source" "$work/ray_dfml"
cd "$work/ray_dfml"
step environment python3 -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH"
step install pip install --quiet .
step quickstart ray-dfml quickstart --run-dir runs/first
step "second run" ray-dfml train free --pool runs/first-pool --data glyphs --preset quickstart --seed 1 \
  --run-dir runs/second
step report ray-dfml report runs/first runs/second
ls -l runs/first/report.html runs/second/report.html
echo "from clone to the report of the second run: $SECONDS s"
