#!/bin/bash
# Trains on two nodes with eight GPUs each, in as many consecutive jobs as needed:
#
#   sbatch examples/train.slurm.sh data.shards=/scratch/psg model.init=/scratch/clip-vit-base-patch32 run.dir=/scratch/run
#
# Arguments override keys of the config `fast`. Five minutes before the time limit, Slurm signals every rank; the ranks
# save and exit with 75, and the job is requeued and resumes from that checkpoint. Any other exit code ends it.
# Each task is one rank: torchrun between Slurm and the ranks would pass on neither the signal nor the exit code.

#SBATCH --job-name=scenarioclip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=scenarioclip-%j.log

set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}

# If a rank dies, the others end within run.timeout_s. A rank that has saved and exited must not end the others, which
# may still be writing. Since version 22.05, Slurm does not hand --cpus-per-task on from sbatch to srun.
# shellcheck disable=SC2016 # expanded by each task
srun --kill-on-bad-exit=0 "--cpus-per-task=$SLURM_CPUS_PER_TASK" bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec scenarioclip-fast train -c fast --resume "$@"' \
    rank "data.threads=$SLURM_CPUS_PER_TASK" "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
