#!/usr/bin/env bash
# A check of one card shows what no CPU can: attention, vLLM's sleep mode and CUDA graphs, weights by CUDA IPC, memory,
# seconds. What matters most comes first. Each run has a time limit, and a JSON file that is whole at every moment, because
# the machine may go away before the end. The limits are 34 minutes in all, and each of seven starts takes two or three
# more. Once .venv-gpu is there, nothing is downloaded.
#   bash launch/gpu_check.sh [hardware=h100 | hardware=a800 | hardware=rtx4090 | hardware=cpu] [overrides]
#   OUT=folder          for the results (runs/gpu_check/results); please open an issue with its report.md
#   WORK=folder         for the runs themselves (runs/gpu_check)
#   STAGES="0 1 2"      only these, if there is less time
#   MODEL=folder        the pretrained model of stage 4: SmolLM2-135M-Instruct, by verl_recipes.fetch
#   DRY_RUN=1           only print the commands             SETUP=0   use the present Python
# hardware=cpu tries the script itself, to its last line, in some minutes.
case " $* " in *" hardware=cpu "*) STACK=cpu ;; *) STACK=gpu ;; esac
export STACK
. "$(dirname "$0")/common.sh"

OUT=${OUT:-runs/gpu_check/results} STAGES=${STAGES:-0 1 2 3 4 report} work=${WORK:-runs/gpu_check}
pretrained=smollm2_135m_instruct MODEL=${MODEL:-models/smollm2_135m_instruct}
[ "$STACK" = gpu ] || pretrained=tiny MODEL=assets/tiny_base
for stage in $STAGES; do # now, as the stages before a wrong one take half an hour
    [[ " 0 1 2 3 4 report " == *" $stage "* ]] || die "STAGES=$STAGES: stages are 0 1 2 3 4 report"
done
[[ " $STAGES " != *" 4 "* || -d $MODEL || $DRY_RUN = 1 ]] ||
    die "MODEL=$MODEL is no folder: python -m verl_recipes.fetch model=$pretrained out=$MODEL, or STAGES without 4"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_HOST_IP=127.0.0.1 # a machine without a network has no other address
[ "$DRY_RUN" = 1 ] || mkdir -p "$OUT" "$work"
check=(python benchmarks/gpu_check.py)
if [ "$SETUP" = 0 ]; then # verl finds this project by an entry point, which an installed project has
    export PYTHONPATH="$PWD:$PWD/$work/site${PYTHONPATH:+:$PYTHONPATH}"
    step "${check[@]}" entry_points "$work/site"
fi
[ -f data/tiny/train.parquet ] || step python -m data_prep

common=(tuning=full fresh=true seed=0 eval_n=4 data.train_files=data/tiny/train.parquet data.val_files=data/tiny/test.parquet
    trainer.total_training_steps=1000 trainer.save_freq=1000)
few=(eval_n=1 data.val_max_samples=16) small=() shape=(qwen2.5_0.5b) lengths=(1 7 128 1000 8192) steps=1000
answers=(data.max_response_length=256 plan.response_tokens=256) # a random model never ends one before
problems=(preset=3to4 preset.rows=30000 preset.test_size=256) warm=(steps=200 batch=64 lr=5e-4 every=50)
if [ "$STACK" = gpu ]; then
    common=(hardware=h100 "${common[@]}")
else
    mapfile -t as_on_gpus < benchmarks/as_on_gpus.txt
    common+=("${as_on_gpus[@]}" prompts=8 data.max_response_length=64 "${few[@]}")
    steps=10 small=(prompts=8 actor_rollout_ref.rollout.n=8) lengths=(1 7 128)
    shape=(tiny num_hidden_layers=2 vocab_size=2000) answers=(architecture.num_hidden_layers=2 architecture.vocab_size=2000)
    problems=(preset=tiny) warm=(steps=4 batch=16 lr=1e-3 every=2)
fi

# run NAME SECONDS STEPS OVERRIDES: a run, ended after so many training steps (0: it ends itself), or so many seconds after
# its first rollouts. COMMAND=warm_start is another command than train.
run() {
    local name=$1 seconds=$2 steps=$3
    shift 3
    step "${check[@]}" run "$OUT/$name.json" "$seconds" "$steps" python -m "verl_recipes.${COMMAND:-train}" "run_dir=$work/$name" \
        "${common[@]}" "$@" ||
        { failed+=("$name"); echo "gpu_check: $name failed, see $OUT/$name.json" >&2; }
}

failed=()
for stage in $STAGES; do
    case $stage in
        0) # card, driver, versions; attention against sdpa in bf16
            step timeout 150 "${check[@]}" card "$OUT/card.json" "${lengths[@]}" || failed+=(card)
            step timeout 60 python -m verl_recipes.doctor "${common[@]}" "$@" || : ;;
        1) # GRPO on the tiny model: a base accuracy of 0.22 proves that vLLM holds the weights, agreement that it gets new ones
            run tiny 120 "$steps" recipe=tiny model=tiny prompts=128 actor_rollout_ref.rollout.n=16 trainer.test_freq=20 \
                "${small[@]}" "$@" ;;
        2) # 0.5B, random weights, the recipe's batch: memory of every phase and seconds, beside plan's
            step "${check[@]}" model "$work/model" "${shape[@]}" || failed+=(model)
            for recipe in tinyzero_grpo tinyzero_ppo; do
                seconds=180 # for three steps; those of GRPO, with five times the responses, took 80 each on an H100
                [ "$recipe" = tinyzero_ppo ] || seconds=420
                run "$recipe" "$seconds" 3 "recipe=$recipe" "model=${shape[0]}" "actor_rollout_ref.model.path=$work/model" \
                    "${answers[@]}" "${few[@]}" "${small[@]}" "$@"
            done ;;
        3) # LoRA: a step and a save, then a resume, a step and an export
            lora=(recipe=tinyzero_grpo model=tiny tuning=lora prompts=8 updates=1 trainer.save_freq=1 "${few[@]}")
            run lora 120 0 "${lora[@]}" trainer.total_training_steps=1 "$@"
            run resumed 120 0 "${lora[@]}" trainer.total_training_steps=2 "run_dir=$work/lora" fresh=false "$@" ;;
        4) # a pretrained model: warm-started on traces, measured, and GRPO until the time ends
            data=$work/problems
            of_model=(recipe=tinyzero_grpo "model=$pretrained" "actor_rollout_ref.model.path=$MODEL"
                "data.train_files=$data/train.parquet" "data.val_files=$data/test.parquet" data.max_response_length=256
                actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768)
            { step python -m data_prep "out=$data" "tokenizer=$MODEL" "${problems[@]}" &&
                step python -m data_prep.traces "data=$data" "out=$work/traces" "tokenizer=$MODEL" max_tokens=256; } ||
                failed+=(problems)
            COMMAND=warm_start run warm 600 0 "${of_model[@]}" "traces=$work/traces" "${warm[@]}" "$@"
            start=("warm_start=$work/warm")
            [ "$DRY_RUN" = 1 ] || [ -d "$work/warm/model" ] || start=() # it was ended before it had one
            run pretrained 240 "$steps" "${of_model[@]}" "${start[@]}" prompts=128 actor_rollout_ref.rollout.n=8 \
                learning_rate=3e-5 actor_rollout_ref.actor.use_kl_loss=false trainer.test_freq=10 "${small[@]}" "$@" ;;
        report) step "${check[@]}" report "$OUT" ;;
    esac
done
[ ${#failed[@]} = 0 ] || die "gpu_check: failed: ${failed[*]}"
[ "$DRY_RUN" = 1 ] || echo "gpu_check: all of it is in $OUT"
