#!/usr/bin/env bash
# A training that is measured as it goes, one rank per GPU, on one or more nodes:
#     sbatch examples/slurm/train.sh SCRIPT.py [ARGUMENTS]
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${PROJECT:-${SLURM_SUBMIT_DIR:-.}}" # the clone of this project
. "${VENV:-.venv}/bin/activate"

# A server that all nodes reach; without one, a database in the working folder. Where it is down, nothing waits for it.
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///$PWD/mlflow.db}"
ranks="${SLURM_GPUS_ON_NODE:-1}"
threads=$((${SLURM_CPUS_PER_TASK:-1} / ranks))
export OMP_NUM_THREADS="$((threads > 0 ? threads : 1))"

# torchrun starts the ranks of a node. Lightning can do without: ask for one task per GPU, and `srun python SCRIPT.py`.
host=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2> /dev/null | head -n 1 || true)
srun torchrun --nnodes "${SLURM_JOB_NUM_NODES:-1}" --nproc-per-node "$ranks" --rdzv-backend c10d \
    --rdzv-endpoint "${host:-localhost}:${PORT:-29500}" --rdzv-id "${SLURM_JOB_ID:-0}" \
    "${1:?expected a training script}" "${@:2}"
