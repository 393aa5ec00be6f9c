#!/bin/bash
#SBATCH --job-name=opsd_qwen3_235b_a22b
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@1800
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Trains Qwen3-235B-A22B on 32 nodes of 8 GPUs with 80 GB: examples/qwen3_235b_a22b.toml.
# bash (sbatch) and Python (torchrun) both read this file:
#   MODEL=/checkpoints/Qwen3-235B-A22B DATA=/data/train.jsonl sbatch launch_scripts/opsd_qwen3_235b_a22b.sh
# or on each node, with the same variables,
#   torchrun --nnodes 32 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --nproc-per-node 8 launch_scripts/opsd_qwen3_235b_a22b.sh
# OUT: the run's folder (runs/qwen3_235b_a22b); VENV or CONTAINER_IMAGE: where Python is; launch_scripts/slurm.sh has all.
# Arguments are settings: --optim.lr 5e-7. The way from an empty account to a finished run: docs/running_on_slurm.md

""":"
script=$(realpath "$0")
if [ "${0##*/}" = slurm_script ]; then # SLURM's copy; the job's record says where this file is
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//; T; s/[.]sh .*/.sh/; p')
fi
source "${OPSD_HOME:-${script%/launch_scripts/*}}/launch_scripts/slurm.sh"
exit
: '
"""
if __name__ == "__main__":  # the processes it spawns read this file too
    from megatron_opsd.launch import main

    main("qwen3_235b_a22b")
# '
