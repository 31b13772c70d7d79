#!/usr/bin/env bash
# A ladder on one set of problems: a base model, a warm start on traces, reinforcement learning from there; each is measured
# on the same test problems and compared with the one before; the report shows all three (docs/warm_start.md).
#   bash launch/ladder.sh MODEL [overrides of verl_recipes.train, hardware= among them]
#   MODEL          a name of configs/model; fetched into models/MODEL unless it is there (launch/middle.sh makes `middle`)
#   NAME=ladder    of data/NAME, data/NAME-traces, runs/NAME-warm, runs/NAME and runs/evaluations/NAME-*
#   DATA, TRACES, WARM, EVAL    overrides of these commands: DATA="prompt=mini_r1 preset=3to4" WARM="lr=2e-5 steps=200";
#                  traces have 256 tokens at most, unless TRACES= says otherwise
#   DRY_RUN=1      only print the commands
# The same command again goes on where it was ended.
case " $* " in *" hardware=cpu "*) STACK=cpu ;; *" hardware="*) STACK=gpu ;; *) STACK=cpu ;; esac # configs/train.yaml: cpu
export STACK
. "$(dirname "$0")/common.sh"

model=${1:-} name=${NAME:-ladder}
[[ -n $model && $model != *=* ]] || die "name a model of configs/model: bash launch/ladder.sh qwen2.5_0.5b hardware=a800"
shift
[[ $name =~ ^[A-Za-z][A-Za-z0-9\ ._-]*$ ]] || # Hydra reads 2026_11_29 and 1e-4 as numbers
    die "NAME=$name: one name of a folder is wanted: a letter of ASCII first, then letters, digits, blanks and . _ -"
for each in "$@"; do # another value would be noticed only after the warm start
    case $each in name=* | run_dir=* | seeds=* | warm_start=*) die "${each%%=*}= is set by the ladder; NAME= names its folders" ;; esac
done
data=data/$name base=models/$model measured=runs/evaluations/$name
[ "$model" != tiny ] || base=assets/tiny_base
[ -e "$base" ] || [ "$model" != middle ] || [ "${DRY_RUN:-0}" = 1 ] || die "there is no $base: bash launch/middle.sh makes it"
read -rd '' -a of_data <<< "${DATA:-}" || : # all lines; at their end it fails
read -rd '' -a of_traces <<< "tokenizer=$base max_tokens=256 ${TRACES:-}" || :
read -rd '' -a of_warm <<< "${WARM:-}" || :
read -rd '' -a of_eval <<< "${EVAL:-}" || :
run=("model=$model" "data.train_files=$data/train.parquet" "data.val_files=$data/test.parquet" "$@")
before=
for each in "$@"; do # what an evaluation takes of a run
    case $before$each in fresh=* | hardware=* | gpus=* | nodes=* | recipe=* | data.max_* | --config-dir*) of_eval+=("$each") ;; esac
    [ "$each" = --config-dir ] && before=$each || before=
done

measure() {
    step python -m verl_recipes.evaluate "model=$2" "data=$data" "out=$measured-$1" "${of_eval[@]}"
}

step python -m data_prep "out=$data" "${of_data[@]}"
[ -e "$base" ] || [ "$model" = middle ] || step python -m verl_recipes.fetch "model=$model" "out=$base"
step python -m data_prep.traces "data=$data" "out=$data-traces" "${of_traces[@]}"
measure base "$base"
step python -m verl_recipes.warm_start "name=$name-warm" "traces=$data-traces" "actor_rollout_ref.model.path=$base" "${run[@]}" "${of_warm[@]}"
measure warm "runs/$name-warm"
launch "name=$name" "warm_start=runs/$name-warm" "${run[@]}"
measure trained "runs/$name"
step python -m verl_recipes.evaluate compare "$measured-base" "$measured-warm"
step python -m verl_recipes.evaluate compare "$measured-warm" "$measured-trained"
step python -m verl_recipes.report "runs/$name" "$measured-base" "$measured-warm" "$measured-trained"
