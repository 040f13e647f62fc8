#!/usr/bin/env bash
# `make gpu`: on a machine with a GPU, nvcc and torch, with or without a registry. Builds in place, runs the GPU tests and the
# sanitizer, measures, and runs the demo. Each section has a time budget; all of them together end within $TOTAL seconds.
# After each section $OUT holds what there is by then, in a few files, so that a cut run still leaves what came before:
# record.json, README.md and sections.csv, log.txt with every section's output, and all.tar.gz with everything.
# ONLY="tests bench_step" runs the build and these sections alone: for another look at what failed or was left out.
# Wheels in wheels/ are installed first: what such a machine lacks (simplejpeg, ...) can be carried there.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
LEFT=${OUT:-runs/gpu}
TOTAL=${TOTAL:-470}
ONLY=${ONLY:-}
failed=0

command -v "$PYTHON" >/dev/null || { echo "error: $PYTHON is not on PATH: make gpu PYTHON=..." >&2; exit 2; }
"$PYTHON" -c 'import torch' 2>/dev/null ||
  { echo "error: $PYTHON has no torch: make gpu takes the torch that is there (PYTHON=... names another Python)" >&2; exit 2; }
"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
  { echo "error: $PYTHON sees no GPU through torch: make gpu needs a machine with one" >&2; exit 2; }
mkdir -p "$LEFT" || exit 2
LEFT=$(cd "$LEFT" && pwd)
rm -f "$LEFT"/{record.json,README.md,sections.csv,log.txt,all.tar.gz}
OUT=$(mktemp -d "${TMPDIR:-/tmp}/scenarioclip-fast-gpu.XXXXXX") || exit 2
export OUT
trap 'rm -rf "$OUT"' EXIT

keep() {
  local name
  for name in record.json README.md sections.csv; do
    [ -e "$OUT/$name" ] && cp "$OUT/$name" "$LEFT/$name"
  done
  # The demo's scenes, shards and weights are large, and can be made again.
  tar -czf "$LEFT/all.tar.gz" -C "$OUT" --exclude=./demo/scenes --exclude=./demo/shards --exclude=checkpoints \
    --exclude='*.safetensors' .
}

note() { # NAME EXIT SECONDS
  echo "$1,$2,$3" >>"$OUT/sections.csv"
}

section() { # NAME BUDGET COMMAND...
  local name=$1 budget=$2 start=$SECONDS code
  shift 2
  [[ -n $ONLY && " build wheels $ONLY " != *" $name "* ]] && return 0
  ((budget > TOTAL - SECONDS)) && budget=$((TOTAL - SECONDS))
  if ((budget < 5)); then
    echo "== $name: left out, no time is left"
    note "$name" "left out: no time was left" 0
    failed=1
    return 1
  fi
  echo "== $name (at most $budget s)"
  # An interrupt, even where the caller ignores them, and not an end: pytest then still says what has failed so far.
  timeout --signal=INT --kill-after=10 "$budget" env --default-signal=INT "$@" >"$OUT/$name.txt" 2>&1
  code=$?
  tail -n 15 "$OUT/$name.txt"
  echo "== $name: exit $code after $((SECONDS - start)) s"
  { echo "== $name: exit $code after $((SECONDS - start)) s"; cat "$OUT/$name.txt"; } >>"$LEFT/log.txt"
  ((code == 0)) || failed=1
  local said=$code
  ((code == 124 || code == 137)) && said="stopped at its budget of $budget s"
  note "$name" "$said" $((SECONDS - start))
  keep
  return $code
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

echo "section,exit,seconds" >"$OUT/sections.csv"
if compgen -G "wheels/*.whl" >/dev/null; then
  # One at a time and as they are: what is there already is kept, and a wheel that does not fit costs only itself.
  section wheels 60 env PYTHON="$PYTHON" bash -c \
    'for w in wheels/*.whl; do "$PYTHON" -m pip install --no-index --no-deps "$w" || bad=1; done; exit "${bad:-0}"'
fi
# Code for the device at hand alone.
archs=$("$PYTHON" -c 'import torch; a = "%d%d" % torch.cuda.get_device_capability(); print({"90": "90a"}.get(a, a))')
section build 120 env SCENARIOCLIP_FAST_BUILD=cuda SCENARIOCLIP_FAST_ARCHS="${SCENARIOCLIP_FAST_ARCHS:-$archs}" \
  "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --editable . || exit 1
scf() { section "$1" "$2" "$PYTHON" -m scenarioclip_fast.cli.main "${@:3}"; }
scf doctor 30 doctor
if has pytest; then
  # Most of the tests' time is compiling, which goes in parallel.
  parallel=()
  has xdist && parallel=(-n 8)
  # A test file whose own needs are missing here must not keep the others from running.
  section tests 130 env OMP_NUM_THREADS=2 "$PYTHON" -m pytest tests -m gpu --continue-on-collection-errors --tb=short \
    -rs --durations=10 "${parallel[@]}"
  # A section each: a slow one costs only itself. A limit below the budget lets the record be written.
  for entry in ceilings:15 contrastive:80 distillation:15 views:25 step:60 end_to_end:85 data:45 ema:10 trainer:25; do
    name=${entry%:*} limit=${entry#*:}
    [ -e "benchmarks/bench_$name.py" ] || continue
    ((limit > TOTAL - SECONDS - 12)) && limit=$((TOTAL - SECONDS - 12))
    ((limit < 5)) && limit=5
    scf "bench_$name" $((limit + 12)) bench "$name" --device cuda --limit "$limit" --out "$OUT"
  done
else
  echo "== tests and benchmarks: left out, pytest is not installed (carry its wheels in wheels/)"
  note "tests and benchmarks" "left out: pytest is not installed" 0
  failed=1
fi
scf demo 60 demo --device cuda --out "$OUT/demo"
if command -v compute-sanitizer >/dev/null; then
  # Races are looked for in kernels written by hand: Triton places the barriers of its own.
  section racecheck 40 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" benchmarks/sanitize.py cuda
  section memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" benchmarks/sanitize.py cuda triton
elif [[ -z $ONLY ]]; then
  echo "== sanitizer: left out, compute-sanitizer is not on PATH"
  note sanitizer "left out: compute-sanitizer is not on PATH" 0
fi
[ -e "$OUT/record.json" ] && "$PYTHON" benchmarks/readme.py "$OUT"
keep
cat "$OUT/sections.csv"
exit $failed
