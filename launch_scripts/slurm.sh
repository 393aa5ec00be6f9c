# The batch part of every launch script: one torchrun on each node of the job, its restarts, its signals.
# Sourced by launch_scripts/opsd_*.sh with `script`, the launch script's own path, in a SLURM batch job.
#
#   MODEL            Hugging Face directory of the model, on a file system that all nodes see          (required)
#   DATA             problems with worked solutions: JSONL, JSON or parquet, or a dataset of the hub   (required)
#   RECIPE           another file of examples/ than the script's own, such as qwen3_1p7b_grpo
#   OUT              the run's folder, on a shared file system; the same one resumes          (runs/<script's name>)
#   VENV             a virtual environment with the package                         (.venv of the repository, if any)
#   CONTAINER_IMAGE  instead of VENV: an image for pyxis, such as a .sqsh file of enroot
#   CONTAINER_MOUNTS pyxis' --container-mounts    (in place: the repository, OUT, MODEL and the folders of data files)
#   LOCAL_DISK       a folder on each node's own disk, for caches of compiled kernels                (TMPDIR or /tmp)
#   MAX_RESTARTS     restarts after crashes in a row without a new checkpoint                                     (3)
#   OPSD_HOME        the repository, where the job's record does not lead to it
#
# Arguments after the script's name are settings: sbatch launch_scripts/opsd_qwen3_8b.sh --optim.lr 5e-7
# NCCL's and the network's variables are the site's: whatever is exported where sbatch runs reaches every rank.

OPSD_HOME=${OPSD_HOME:-${script%/launch_scripts/*}}
script=$OPSD_HOME/launch_scripts/${script##*/}
name=${script##*/opsd_} name=${name%.sh}

say() { echo "$(date '+%F %T') ${script##*/}: $*"; }
stop() {
    echo "${script##*/}: $*" >&2
    exit 1
}
head_value() { sed -n "s/^#SBATCH --$1=//p" "$script"; } # what the launch script's head asks for

if [ -z "${SLURM_JOB_ID:-}" ]; then
    stop "not in a SLURM job; type 'sbatch $script', or on each node: $(sed -n 's/^# *torchrun /torchrun /p' "$script")"
fi

# --- Processes of a node: one for each GPU, or for each CPU where the launch script's head asks for no GPUs.
processes=${SLURM_GPUS_ON_NODE:-0}
[ -n "${SLURM_CPUS_PER_TASK:-}" ] || stop "SLURM_CPUS_PER_TASK is not set; say sbatch --cpus-per-task=N"
if [ "$processes" = 0 ]; then
    [ -z "$(head_value gpus-per-node)" ] ||
        stop "SLURM_GPUS_ON_NODE is not set: the job got no GPUs; say sbatch --gpus-per-node=N or --gres=gpu:N"
    processes=$SLURM_CPUS_PER_TASK
fi

OUT=$(realpath -m "${OUT:-runs/$name}")
mkdir -p "$OUT" || stop "OUT=$OUT: cannot make it"
export OUT PYTHONPATH=$OPSD_HOME${PYTHONPATH:+:$PYTHONPATH}
max_restarts=${MAX_RESTARTS:-3}
signal_lead=$(head_value signal) signal_lead=${signal_lead##*@}

# --- Restarts. $OUT/restarts: job, its starts since the newest checkpoint, that checkpoint. Counted when a start
# begins, because the node that runs this script may die, and SLURM then starts the job again by itself.
newest_checkpoint() {
    local found=("$OUT"/checkpoints/step_*)
    [ -e "${found[-1]}" ] && basename "${found[-1]}" || echo none
}
outcome() {
    ls "$OUT" >/dev/null # has NFS look again for what another node may have written
    cat "$OUT/outcome" 2>/dev/null
}
give_up() {
    local why="crashed $1 times in a row without a new checkpoint (newest: $checkpoint, MAX_RESTARTS=$max_restarts)"
    echo "stopped: $why" >"$OUT/outcome"
    stop "giving up: $why; see above and $OUT/logs for what went wrong"
}
checkpoint=$(newest_checkpoint) starts=1 job= counted= seen=
read -r job counted seen 2>/dev/null <"$OUT/restarts"
if [ -n "$job" ] && [ "$job" != "$SLURM_JOB_ID" ]; then
    living=$(squeue --noheader --jobs="$job" --states=PENDING,RUNNING,SUSPENDED --format=%T 2>/dev/null)
    [ -z "$living" ] || stop "OUT=$OUT: job $job ($living) trains there; scancel it, or choose another OUT"
elif [ "$seen" = "$checkpoint" ] && [[ $(outcome) != interrupted* ]]; then
    starts=$((counted + 1))
    [ "$counted" -le "$max_restarts" ] || give_up "$counted"
fi
echo "$SLURM_JOB_ID $starts $checkpoint" >"$OUT/restarts" || stop "OUT=$OUT: cannot write to it"
rm -f "$OUT/outcome"

# --- Where things are.
source "$OPSD_HOME/launch_scripts/paths.sh"
container=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
    mounts=${CONTAINER_MOUNTS:-$(container_mounts)} || exit
    container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts")
    container+=(--container-workdir="$OPSD_HOME")
else
    VENV=${VENV:-$OPSD_HOME/.venv}
    [ ! -e "$VENV/bin/activate" ] || source "$VENV/bin/activate"
    command -v torchrun >/dev/null || stop "no torchrun in $VENV or PATH; set VENV or CONTAINER_IMAGE"
fi
local_disk=${LOCAL_DISK:-${TMPDIR:-/tmp}}/opsd-$(id -un)
export TRITON_CACHE_DIR=$local_disk/triton VLLM_CACHE_ROOT=$local_disk/vllm # a shared disk locks and races

# --- Signals. Until the run has started there is nothing to save.
step=
trap 'say "USR1: the run saves and ends"; [ -z "$step" ] || kill -USR1 $step' USR1
trap 'say "TERM: SLURM ends the job"' TERM # it tells the ranks itself

# --- The run. The others meet at the first node's address as SLURM knows it: the node itself may say 127.0.1.1.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
case $address in '' | 127.* | ::1 | localhost) address=$first_node ;; *:*) address=[$address] ;; esac
torchrun=(
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes"
    --rdzv-backend c10d --rdzv-endpoint "$address:$((20000 + SLURM_JOB_ID % 10000))"
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
)
say "job $SLURM_JOB_ID, start $starts since checkpoint $checkpoint, on $SLURM_JOB_NODELIST; OUT=$OUT"
# USR1 would end torchrun. It is for the workers, which have a handler of their own.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "${container[@]}" \
    bash -c 'trap "" USR1; exec torchrun --rdzv-conf "is_host=$((SLURM_NODEID == 0))" "$@"' - \
    "${torchrun[@]}" "$script" --checkpoint.signal_lead_seconds "$signal_lead" "${arguments[@]}" &
step=$!
while kill -0 $step 2>/dev/null; do wait $step; done # a trap ends `wait` early

# --- The end. SLURM requeues by itself what it ends itself, or means to end it: then the job no longer is RUNNING.
requeue() {
    local state
    state=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*')
    say "$1 (${state#*=}, newest checkpoint: $(newest_checkpoint))"
    [ "$state" = JobState=RUNNING ] || exit 0
    trap - TERM
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script meanwhile
    stop "job $SLURM_JOB_ID could not be requeued; submit it again to go on from $(newest_checkpoint)"
}
if [ -e "$OUT/refused_$SLURM_JOB_ID" ]; then # the folder is another run's, which has an outcome of its own
    why=$(<"$OUT/refused_$SLURM_JOB_ID")
    rm "$OUT/refused_$SLURM_JOB_ID"
    stop "$why"
fi
case $(outcome) in
    finished*) say "$(outcome)" ;;
    stopped*) stop "$(outcome)" ;;
    interrupted*) requeue "$(outcome)" ;;
    *)
        [ "$(newest_checkpoint)" != "$checkpoint" ] || [ $starts -le "$max_restarts" ] || give_up "$starts"
        requeue crashed
        ;;
esac
