#!/usr/bin/env bash
#SBATCH --job-name=jax_speedrun
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
#SBATCH --signal=TERM@60
#SBATCH --output=%x-%j.out
#
# A training run under Slurm, one process a GPU:
#
#   sbatch scripts/train_slurm.sh --preset sub3min --mesh 8 --data data/fineweb10B --out runs/first
#
# Submit it in the repository, which all nodes must see, with .venv set up. For more nodes:
# `sbatch --nodes=2 scripts/train_slurm.sh --mesh 16 --sequences 16 ...`. A minute before its time is up the run saves a
# checkpoint and ends; the same command with `--resume runs/first` instead of `--out runs/first` goes on from there.
# Every process must see all of its node's GPUs, so no --gpus-per-task.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
exec srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" scripts/train.py "$@"
