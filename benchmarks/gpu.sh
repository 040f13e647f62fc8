#!/usr/bin/env bash
# `make gpu`: on a machine with a GPU, nvcc and torch, with or without a registry. Builds in place, runs the GPU tests, then the
# benchmarks, and leaves one record in $OUT. Each section has a time budget, so that a cut run still leaves what came before.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
failed=0

section() { # NAME SECONDS COMMAND...
  local name=$1 budget=$2 start=$SECONDS code
  shift 2
  echo "== $name (at most $budget s)"
  timeout "$budget" "$@" >"$OUT/$name.txt" 2>&1
  code=$?
  tail -n 15 "$OUT/$name.txt"
  echo "== $name: exit $code after $((SECONDS - start)) s"
  echo "$name,$code,$((SECONDS - start))" >>"$OUT/sections.csv"
  [ $code -eq 0 ] || failed=1
  return $code
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
  { echo "error: $PYTHON sees no GPU through torch: make gpu needs a machine with one"; exit 2; }

echo "section,exit,seconds" >"$OUT/sections.csv"
section build 90 env SCENARIOCLIP_FAST_BUILD=cuda "$PYTHON" -m pip install --no-build-isolation --no-deps --editable . || exit 1
section doctor 30 "$PYTHON" -m scenarioclip_fast.cli.main doctor
section machine 20 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
git rev-parse HEAD >"$OUT/commit.txt" 2>/dev/null || echo "unknown" >"$OUT/commit.txt"
# A test file whose own needs are missing here must not keep the others from running.
section tests 120 "$PYTHON" -m pytest tests -m gpu --continue-on-collection-errors
if has pytest_benchmark; then
  for entry in contrastive:60 views:40 distillation:20 step:60 data:40; do # a section each: a slow one costs only itself
    name=${entry%:*}
    section "bench_$name" "${entry#*:}" "$PYTHON" -m pytest "benchmarks/bench_$name.py" -m gpu --benchmark-only \
      --benchmark-json="$OUT/bench_$name.json"
  done
else
  echo "== benchmarks: left out, pytest-benchmark is not installed"
  echo "benchmarks,left out: pytest-benchmark is not installed,0" >>"$OUT/sections.csv"
fi
cat "$OUT/sections.csv"
exit $failed
