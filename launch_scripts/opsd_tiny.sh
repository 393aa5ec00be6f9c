#!/bin/bash
#SBATCH --job-name=opsd_tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=12G
#SBATCH --time=00:30:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# A tiny Qwen3 on two nodes without GPUs, two processes each: examples/arithmetic. Shows in two minutes that a cluster's
# nodes find each other, save, and come back. bash (sbatch) and Python (torchrun) both read this file:
#   sbatch launch_scripts/opsd_tiny.sh
# or on each node
#   torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --nproc-per-node 2 launch_scripts/opsd_tiny.sh
# OUT: the run's folder (runs/tiny); MODEL and DATA: the example's; VENV or CONTAINER_IMAGE: where Python is;
# launch_scripts/slurm.sh has all. Arguments are settings: --train.steps 20

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

    few = {"train.steps": "8", "train.global_batch_size": "16", "train.micro_batch_size": "8", "evaluate.interval": "0"}
    main("arithmetic/opsd", "arithmetic/base", "arithmetic/problems.py", {**few, "checkpoint.save_interval": "2"})
# '
