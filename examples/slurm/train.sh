#!/usr/bin/env bash
# A training that is measured as it goes, on the GPUs of one or more nodes: sbatch examples/slurm/train.sh [ARGUMENTS]
# ARGUMENTS go to the script, such as: --steps 600 --out pretrained/my-run
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${PROJECT:-${SLURM_SUBMIT_DIR:-.}}" # the clone of this project
. "${VENV:-.venv}/bin/activate"

# A server that all nodes reach; without one, a database in the working folder. Where it is down, nothing waits for it.
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///$PWD/mlflow.db}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# Lightning finds Slurm's ranks by itself: one task per GPU then, `#SBATCH --ntasks-per-node=2`, and `srun python ...`.
# torchrun starts a rank per GPU on each node, and is what the Hugging Face Trainer, accelerate and own loops want.
nodes="${SLURM_JOB_NUM_NODES:-1}"
host=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2> /dev/null | head -n 1 || true)
srun torchrun --nnodes "$nodes" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --rdzv-backend c10d \
    --rdzv-endpoint "${host:-localhost}:${PORT:-29500}" --rdzv-id "${SLURM_JOB_ID:-0}" \
    "${SCRIPT:-examples/pretrain.py}" "$@"
