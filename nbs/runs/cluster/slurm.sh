#!/bin/bash
# A run on several machines under Slurm:
#     sbatch --nodes=4 slurm.sh RUN_FOLDER RECIPE name=value ...
# RUN_FOLDER is made if it is not there and lies on a disk that all machines share. Starting the same line again, by hand
# or by Slurm after a machine was lost, goes on from the last checkpoint. Adapt the lines below to your cluster.
#SBATCH --job-name=vidlab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one launcher a machine; it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120            # before the time is over: finish the step, save
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
run=${1:?which run folder?}
mkdir -p "$run"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} / processes > 0 ? ${SLURM_CPUS_PER_TASK:-1} / processes : 1))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1      # a restart must not find the addresses of processes that have ended

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" --max-restarts="${RESTARTS:-3}" \
    --rdzv-id="vidlab-$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:${PORT:-29500}" \
    -m vidlab.train "$@"
code=$?

# stopped by the signal above and not yet done: back into the queue, where it goes on
if grep -q '"state": "stopped"' "$run/status.json"; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
