#!/usr/bin/env bash
# One call on a machine with a GPU: GPT-2 124M dense and pruned by bitter7 for STEPS steps, resumed once, then the selection's
# time. TOKENS is a folder of GPT-2 shards (prepare_fineweb.py), RESULTS the folder for the tables.
#   TOKENS=data/novels RESULTS=results/h100 bash bench/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
TOKENS=${TOKENS:?a folder of GPT-2 token shards} RESULTS=${RESULTS:-results/gpu} STEPS=${STEPS:-200}
mkdir -p "$RESULTS"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$RESULTS/device.txt"
python -c "import torch; print('torch', torch.__version__)" | tee -a "$RESULTS/device.txt"
for recipe in gpt2_124m bitter7; do
    run="out/gpu-$recipe"
    python train_gpt2.py "config/$recipe.py" --data_dir="$TOKENS" --out_dir="$run" --max_iters="$STEPS" --warmup_iters=50 \
        --eval_interval=100 --checkpoint_interval=100 2>&1 | tee "$RESULTS/$recipe.log"
    nvidia-smi --query-gpu=memory.used --format=csv,noheader >> "$RESULTS/$recipe.log"
    cp "$run/metrics.jsonl" "$RESULTS/$recipe.metrics.jsonl"
done
python -m bench.select --rounds 5 | tee "$RESULTS/select.txt"
python -m bench.select --layers 48 --width 1600 --rounds 3 | tee -a "$RESULTS/select.txt"
