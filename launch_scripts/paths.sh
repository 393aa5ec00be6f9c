# Paths of a run on several nodes: absolute, because a container has a working directory of its own, and mounted there.
# Sourced by slurm.sh, with its `stop` and its variables.

absolute() { # what exists; a file keeps its own name, which says its format. Ids of the hub stay as they are
    if [ -d "$1" ]; then
        realpath "$1"
    elif [ -e "$1" ]; then
        echo "$(realpath "${1%"${1##*/}"}.")/${1##*/}"
    else
        echo "$1"
    fi
}

# MODEL, DATA, and of the arguments checkpoint.resume and the settings named *.path, such as --evaluate.data.path.
MODEL=$(absolute "${MODEL:-}") DATA=$(absolute "${DATA:-}")
paths=("$MODEL" "$DATA") arguments=() before=
for argument in "$@"; do
    setting=
    case $argument in --*.path=* | --checkpoint.resume=*) setting=${argument%%=*}= ;; esac
    if [ -n "$setting" ] || [[ $before == --*.path || $before == --checkpoint.resume ]]; then
        paths+=("$(absolute "${argument#"$setting"}")")
        argument=$setting${paths[-1]}
    fi
    arguments+=("$argument") before=$argument
done
export MODEL DATA

folders() { # that a container needs: those of the paths, and of the files they link to, as in the cache of the hub
    local path
    printf '%s\n' "$OPSD_HOME" "$OUT"
    for path in "${paths[@]}"; do
        [[ $path == /* ]] || continue
        [ -d "$path" ] && echo "$path" || dirname "$path"
        find "$path" -maxdepth 1 -type l -exec realpath {} + 2>/dev/null | xargs -r -d '\n' dirname
    done
}

container_mounts() {
    local folder mounts=
    while read -r folder; do
        [[ $folder != *[,:]* ]] || stop "$folder: pyxis cannot mount it, for its comma or colon; rename it"
        mounts+=,$folder:$folder
    done < <(folders | sort -u)
    echo "${mounts#,}"
}
