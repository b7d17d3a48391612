#!/usr/bin/env bash
# bash slurm/chain.sh runs/tune model.path=/shared/llama data.train=[/shared/chats.jsonl] \
#     -- input=/shared/text.txt
#
# Three batch jobs, each once the one before has succeeded: fine-tune in the run directory, export
# its adapter to runs/tune.adapter, evaluate the model with it in runs/tune.evaluate. What comes
# after -- is for the evaluation, which also gets what is said of the model. Options of sbatch for
# all three: SBATCH_PARTITION and its like in the environment.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash slurm/chain.sh RUN_DIR key=value... -- key=value..." >&2
    exit 2
fi
run_dir=$1
shift
tune=() score=() second=
for word in "$@"; do
    if [ "$word" = -- ] && [ -z "$second" ]; then
        second=1
    elif [ -n "$second" ]; then
        score+=("$word")
    else
        tune+=("$word")
        case $word in model=* | model.*) score+=("$word") ;; esac
    fi
done
submit() { # RUN_DIR DEPENDENCY WORDS...
    local id
    id=$(RUN_DIR=$1 sbatch --parsable ${2:+"--dependency=afterok:$2" --kill-on-invalid-dep=yes} \
        "${@:3}")
    echo "${id%%;*}"
}
job=$(submit "$run_dir" "" slurm/finetune.sbatch ${tune[@]+"${tune[@]}"})
echo "$job finetune $run_dir"
job=$(submit "$run_dir" "$job" slurm/export.sbatch --to mlx-adapter "$run_dir.adapter")
echo "$job export $run_dir.adapter"
job=$(submit "$run_dir.evaluate" "$job" slurm/evaluate.sbatch ${score[@]+"${score[@]}"} \
    model.adapter="$run_dir.adapter")
echo "$job evaluate $run_dir.evaluate"
