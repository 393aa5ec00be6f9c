#!/bin/bash
#SBATCH --job-name=opsd_qwen3_4b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Trains Qwen3-4B on one node of 8 GPUs with 80 GB: examples/qwen3_4b.toml.
# bash (sbatch) and Python (torchrun) both read this file:
#   MODEL=/checkpoints/Qwen3-4B DATA=/data/train.jsonl sbatch launch_scripts/opsd_qwen3_4b.sh
# or, with the same variables,
#   torchrun --nproc-per-node 8 launch_scripts/opsd_qwen3_4b.sh
# OUT: the run's folder (runs/qwen3_4b); VENV or CONTAINER_IMAGE: where Python is; launch_scripts/slurm.sh has all.
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

    main("qwen3_4b")
# '
