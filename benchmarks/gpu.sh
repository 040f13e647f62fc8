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
section build 150 env SCENARIOCLIP_FAST_BUILD=cuda "$PYTHON" -m pip install --no-build-isolation --no-deps --editable . || exit 1
section doctor 60 "$PYTHON" -m scenarioclip_fast.cli.main doctor
section machine 20 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
git rev-parse HEAD >"$OUT/commit.txt" 2>/dev/null || echo "unknown" >"$OUT/commit.txt"
section tests 150 "$PYTHON" -m pytest tests -m gpu
if has pytest_benchmark; then
  section benchmarks 120 "$PYTHON" -m pytest benchmarks -m gpu --benchmark-only --benchmark-json="$OUT/benchmarks.json"
else
  echo "== benchmarks: left out, pytest-benchmark is not installed"
  echo "benchmarks,left out: pytest-benchmark is not installed,0" >>"$OUT/sections.csv"
fi
cat "$OUT/sections.csv"
exit $failed
