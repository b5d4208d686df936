#!/usr/bin/env bash
# Measures each checkpoint of a training in a task of its own, of a job array:
#     sbatch --array=0-5 examples/slurm/measure.sh 'pretrained/RUN/checkpoints/*' [CONFIG] [OVERRIDES]
# Task N measures the Nth checkpoint of the pattern, in the order of their names; tasks beyond the last end at once.
#SBATCH --job-name=downstream
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
cd "${PROJECT:-${SLURM_SUBMIT_DIR:-.}}" # the clone of this project
. "${VENV:-.venv}/bin/activate"

pattern=${1:?"expected a pattern of checkpoints, such as 'run/checkpoints/*'"}
config=${2:-configs/pretrain.yaml}
overrides=${3:-}
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///$PWD/mlflow.db}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

mapfile -t checkpoints < <(compgen -G "$pattern" | sort -V)
index=${SLURM_ARRAY_TASK_ID:-0}
if ((index >= ${#checkpoints[@]})); then
    echo "no checkpoint $index: '$pattern' has ${#checkpoints[@]}" >&2
    exit 0
fi
exec python -m pipeline main --ckpt="${checkpoints[index]}" --config="$config" --overrides="$overrides"
