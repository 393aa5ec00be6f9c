#!/bin/bash
#SBATCH --job-name=smoke_gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --mem=96G
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.log
#
# The first thing to run on GPUs: three training steps of a random Qwen3 of 0.6B's shape; prints PASS or FAIL for each
# check and ends with status 1 if one fails. docs/running_on_slurm.md says how to read it.
#   sbatch launch_scripts/smoke_gpu.sh
# or on a machine with GPUs
#   bash launch_scripts/smoke_gpu.sh
# Without a GPU a tiny model takes the same way on the CPU. One GPU is enough (--gpus-per-node=1); two also test NCCL.
#
#   OUT              a new folder on a disk with 30 GB                            (runs/smoke_gpu_<job or time>)
#   VENV             a virtual environment with the package                       (.venv of the repository, if any)
#   CONTAINER_IMAGE  instead of VENV, in a SLURM job: an image for pyxis
#   LOCAL_DISK       a folder on the node's own disk, for caches of compiled kernels             (TMPDIR or /tmp)
# Arguments go to tools/smoke.py: --shape tiny, --ranks 1

script=$(realpath "$0")
if [ "${0##*/}" = slurm_script ]; then # SLURM's copy; the job's record says where this file is
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//; T; s/[.]sh .*/.sh/; p')
fi
OPSD_HOME=${OPSD_HOME:-${script%/launch_scripts/*}}

stop() {
    echo "smoke_gpu.sh: $*" >&2
    exit 1
}

OUT=$(realpath -m "${OUT:-runs/smoke_gpu_${SLURM_JOB_ID:-$(date +%Y%m%d_%H%M%S)}}")
mkdir -p "$OUT" || stop "OUT=$OUT: cannot make it"
local_disk=${LOCAL_DISK:-${TMPDIR:-/tmp}}/opsd-$(id -un)
export TRITON_CACHE_DIR=$local_disk/triton VLLM_CACHE_ROOT=$local_disk/vllm
export PYTHONPATH=$OPSD_HOME${PYTHONPATH:+:$PYTHONPATH}

smoke=(python "$OPSD_HOME/tools/smoke.py" --out "$OUT" "$@")
if [ -n "${CONTAINER_IMAGE:-}" ]; then
    [ -n "${SLURM_JOB_ID:-}" ] || stop "CONTAINER_IMAGE needs a SLURM job with pyxis; type 'sbatch $script'"
    mounts=${CONTAINER_MOUNTS:-$OPSD_HOME:$OPSD_HOME,$OUT:$OUT}
    exec srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --container-image="$CONTAINER_IMAGE" \
        --container-mounts="$mounts" --container-workdir="$OPSD_HOME" "${smoke[@]}"
fi
VENV=${VENV:-$OPSD_HOME/.venv}
[ ! -e "$VENV/bin/activate" ] || source "$VENV/bin/activate"
command -v python >/dev/null || stop "no python in $VENV or PATH; set VENV or CONTAINER_IMAGE"
exec "${smoke[@]}"
