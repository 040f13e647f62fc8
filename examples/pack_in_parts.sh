#!/bin/bash
# Packs a data set in parts on this machine, each in a process of its own, and merges them:
#
#   examples/pack_in_parts.sh PARTS DIR SOURCE [OPTION ...]
#   examples/pack_in_parts.sh 4 shards /data/scenes --shard-size 500
#
# To use several machines, run the line with --part on each of them with other numbers, and the last line when all are
# complete. Run the script again after an error or an interruption: what is packed is kept.

set -eu
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTS DIR SOURCE [OPTION ...]" >&2
    exit 2
fi
parts=$1
out=$2
shift 2

running=()
for ((part = 1; part <= parts; part++)); do
    scenarioclip-fast pack "$@" --out "$out" --part "$part/$parts" --workers 1 &
    running+=($!)
done
code=0
for process in "${running[@]}"; do
    wait "$process" || code=$?
done
if [ "$code" -ne 0 ]; then
    echo "a part failed, see above; run the command again to go on" >&2
    exit "$code"
fi
scenarioclip-fast pack --merge "$out"
