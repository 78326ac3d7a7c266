#!/usr/bin/env bash
# One call on a machine with a GPU measures one phase, meant to take ten minutes at most, all phases together half an hour,
# and the first two, which say most, a third of it. No GPU has run this yet.
#   TOKENS=data/fineweb_edu RESULTS=results/h100 NANOGPT=path/to/nanoGPT bash bench/gpu.sh PHASE [--dry]
# TOKENS: a folder of GPT-2 shards. Phases, or `all` of them:
#   quick    40 steps of 124M dense and pruned, tokens/s and the peak of memory; no step may make the host wait
#   train    this loop and nanoGPT in turn, 124M, the same micro-batch
#   resume   a run that is stopped and continued ends with the bits of one that is not, with --deterministic=True
#   ladder   each step of ours over a plain loop, and nanoGPT beside
#   prune    what pruning costs a step
#   select   time and memory of one update
# --dry: the same on a tiny model, on whatever machine this is.
set -euo pipefail
cd "$(dirname "$0")/.."
PHASE=${1:?quick, train, resume, ladder, prune, select or all} DRY=${2:-}
TOKENS=${TOKENS:?a folder of GPT-2 token shards} RESULTS=${RESULTS:-results/gpu} PYTHON=${PYTHON:-python3}
OUT=$(mktemp -d) && trap 'rm -rf "$OUT"' EXIT
mkdir -p "$RESULTS"
SIZE=(--max_iters=40 --warmup_iters=20 --eval_interval=40 --eval_iters=5 --log_interval=10 --checkpoint_interval=20
    --check_interval=20)
SELECT=(--rounds 3) TRAIN=(--rounds 20) LADDER=(--rounds 10 --minutes 7) PRUNE=(--model 124M --steps 40)
SMALL=(--n_layer=4 --n_head=4 --n_embd=256 --batch_size=8 --gradient_accumulation_steps=4)
if [ "$DRY" = --dry ]; then
    SMALL=(--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --gradient_accumulation_steps=2
        --compile=False)
    SIZE=(--max_iters=6 --warmup_iters=2 --eval_interval=6 --eval_iters=1 --log_interval=2 --checkpoint_interval=3
        --check_interval=3 "${SMALL[@]}")
    SELECT=(--rounds 1 --layers 2 --width 64 --part ways) LADDER=(--rounds 1 --batch_size 1 --vocab_size 65)
    TRAIN=("${LADDER[@]}") PRUNE=(--steps 2)
fi

run() { # name, recipe, options: a run in which no step that logs nothing may make the host wait
    local name=$1 recipe=$2
    shift 2
    "$PYTHON" -m bench.gpu train "config/$recipe.py" --data_dir="$TOKENS" --out_dir="$OUT/$name" "$@"
}

keep() { "$PYTHON" -m bench.gpu "$1" "$OUT" "${@:2}" --to "$RESULTS"; } # a run's numbers, or two runs compared

quick() {
    run dense gpt2_124m "${SIZE[@]}"
    run bitter7 bitter7 "${SIZE[@]}" --prune_begin=2
    keep numbers dense bitter7
}

resume() {
    local options=("${SIZE[@]}" "${SMALL[@]}" --prune_begin=2 --deterministic=True)
    run whole bitter7 "${options[@]}"
    run stopped bitter7 "${options[@]}"
    keep cut stopped # takes away what came after its first checkpoint
    run stopped bitter7 "${options[@]}"
    keep same whole stopped
}

train() { NANOGPT=${NANOGPT:-} "$PYTHON" -m bench.train "${TRAIN[@]}" --to "$RESULTS"; }
ladder() { "$PYTHON" -m bench.ladder ${NANOGPT:+--nanogpt "$NANOGPT"} "${LADDER[@]}" --to "$RESULTS"; }
prune() { "$PYTHON" -m bench.prune "${PRUNE[@]}" --to "$RESULTS"; }
select_() { "$PYTHON" -m bench.select "${SELECT[@]}" --to "$RESULTS"; }

case $PHASE in
quick | train | resume | ladder | prune) "$PHASE" ;;
select) select_ ;;
all) for one in quick train resume ladder prune select_; do "$one"; done ;;
*) echo "$PHASE: expected quick, train, resume, ladder, prune, select or all" >&2 && exit 2 ;;
esac
