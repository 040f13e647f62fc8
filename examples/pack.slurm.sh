#!/bin/bash
# Packs a data set on many nodes, as a job array with a part per task, and merges the parts in a second job:
#
#   job=$(sbatch --parsable --array=1-64 examples/pack.slurm.sh /scratch/shards /data/scenes)
#   sbatch --dependency="afterok:$job" examples/pack.slurm.sh --merge /scratch/shards
#
# SOURCE and DIR are on storage that all nodes see; further arguments are options of `scenarioclip-fast pack`. A task that
# reaches its time limit, or whose node fails, is requeued and resumes. Submit both lines again to repeat parts that
# failed: those that are complete end at once.

#SBATCH --job-name=scenarioclip-pack
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=scenarioclip-pack-%A-%a.log

set -u
if [ "$1" = --merge ]; then
    exec scenarioclip-fast pack "$@"
fi
out=$1
shift

pack=
requeue() {
    [ -z "$pack" ] || kill -KILL "$pack" # finished shards are on disk
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit 0
}
trap requeue TERM

# The array must start at 1: its tasks are the parts 1 to the number of tasks.
scenarioclip-fast pack "$@" --out "$out" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" \
    --workers "$SLURM_CPUS_PER_TASK" &
pack=$!
wait "$pack"
