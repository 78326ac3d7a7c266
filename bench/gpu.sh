#!/usr/bin/env bash
# One call on a machine with a GPU measures one phase, in at most ten minutes; all phases together take half an hour.
#   TOKENS=data/fineweb_edu RESULTS=results/h100 NANOGPT=path/to/nanoGPT bash bench/gpu.sh PHASE [--dry]
# TOKENS: a folder of GPT-2 shards. Phases: quick (40 steps dense and pruned), resume (the same run, stopped and continued),
# ladder (each step of ours, and nanoGPT), prune (an update at every step), select (time and memory of an update).
# --dry: the same commands on a tiny model, on whatever machine this is.
set -euo pipefail
cd "$(dirname "$0")/.."
PHASE=${1:?quick, resume, ladder, prune or select} DRY=${2:-}
TOKENS=${TOKENS:?a folder of GPT-2 token shards} RESULTS=${RESULTS:-results/gpu} PYTHON=${PYTHON:-python3}
OUT=$(mktemp -d) && trap 'rm -rf "$OUT"' EXIT
mkdir -p "$RESULTS"
SIZE=(--max_iters=60 --warmup_iters=20 --eval_interval=60 --eval_iters=5 --log_interval=10 --checkpoint_interval=30)
SELECT=(--rounds 3) LADDER=(--rounds 10)
if [ "$DRY" = --dry ]; then
    SIZE=(--max_iters=6 --warmup_iters=2 --eval_interval=6 --eval_iters=1 --log_interval=2 --checkpoint_interval=3
        --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --gradient_accumulation_steps=2 --compile=False)
    SELECT=(--rounds 1 --layers 2 --width 64) LADDER=(--rounds 1 --vocab_size 65)
fi

train() { # name, recipe, options: a run, then its last line of metrics, the machine and the commit as $RESULTS/name.json
    local name=$1 recipe=$2
    shift 2
    "$PYTHON" train_gpt2.py "config/$recipe.py" --data_dir="$TOKENS" --out_dir="$OUT/$name" "${SIZE[@]}" "$@"
    "$PYTHON" - "$OUT/$name" "$RESULTS/$name.json" <<'PY'
import json, subprocess, sys, torch
run, to = sys.argv[1:]
lines = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
facts = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
         "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()}
json.dump(facts | {"lines": lines}, open(to, "w"), indent=1)
PY
}

case $PHASE in
quick) train dense gpt2_124m && train bitter7 bitter7 --prune_begin=2 ;;
resume)
    train half bitter7 --max_hours=0.02
    train half bitter7
    ;;
ladder) "$PYTHON" -m bench.ladder ${NANOGPT:+--nanogpt "$NANOGPT"} "${LADDER[@]}" --to "$RESULTS" ;;
prune) train every-step bitter7 --prune_begin=2 --prune_interval=1 ;;
select) "$PYTHON" -m bench.select "${SELECT[@]}" | tee "$RESULTS/select.txt" ;;
*) echo "$PHASE: expected quick, resume, ladder, prune or select" >&2 && exit 2 ;;
esac
