# make train: set-up and a GPT that is pruned while it learns, in a minute or two; make test: set-up and all tests.
# make lenet: LeNet-5 on MNIST, one dense run and three pruned ones, with their picture, in about three minutes;
# make memory-comparison: all optimizers and methods, an hour on two cores; make update-graphs: its figures again.
# make study-smoke: a study of nine short runs, killed on the way and resumed, with its tables and figures.
# DATA_DIR=folder with MNIST's four IDX files; without it the Hugging Face hub is asked.

PYTHON ?= python3
BIN := .venv/bin
RUN := out/quickstart
SMOKE := out/study-smoke
MNIST := $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

.PHONY: train test lint docs torture study-smoke bench setup clean-run lenet memory-comparison update-graphs

train: $(RUN)/sample.txt
	@echo
	@cat $(RUN)/sample.txt
	@echo
	@echo "The run in $(RUN) is finished: training.png is its picture, metrics.jsonl its numbers, checkpoints/ its weights."
	@echo "To start anew: make clean-run train"

$(RUN)/sample.txt: | .venv/ready data/quickstart/meta.json
	$(BIN)/python train_gpt2.py config/quickstart.py
	$(BIN)/python -m gpt2.sample $(RUN) --prompt "In the beginning" > $@.tmp && mv $@.tmp $@

data/quickstart/meta.json: | .venv/ready
	$(BIN)/python -m gpt2.kjv data/kjv.txt
	$(BIN)/python prepare_fineweb.py --input data/kjv.txt --tokenizer char --val_tokens 400_000 --out_dir data/quickstart

setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

test: .venv/ready-for-tests
	$(BIN)/python -m pytest -q --numprocesses=logical --maxprocesses=4 --dist=loadfile

torture: .venv/ready-for-tests
	$(BIN)/python -m tests.torture

study-smoke: .venv/ready-for-tests
	rm -rf $(SMOKE)
	-timeout --signal=KILL 20 $(BIN)/python -m study.run smoke --jobs 2 --results $(SMOKE)/results --work $(SMOKE)
	$(BIN)/python -m study.run smoke --jobs 2 --results $(SMOKE)/results --work $(SMOKE)
	$(BIN)/python -m study.report --results $(SMOKE)/results --documents
	cat $(SMOKE)/results/report/smoke_pairs.md

lint: .venv/ready-for-tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy pruning

docs: .venv/ready-for-tests
	$(BIN)/python -m pip install --quiet pdoc
	$(BIN)/python docs/make.py

bench: .venv/ready
	$(BIN)/python -m bench.train

lenet: .venv/ready
	$(BIN)/python -m lenet.compare $(MNIST) --out out/lenet-quick --seeds 1 --runs adamwprune_baseline_* adamwprune_magnitude_90_* adamwprune_bitter?_90_*
	$(BIN)/python -m lenet.plot_comparison out/lenet-quick/runs/*.json --out out/lenet-quick/comparison.png

memory-comparison: .venv/ready
	$(BIN)/python -m lenet.compare $(MNIST) --out out/lenet
	$(BIN)/python -m lenet.plots out/lenet

update-graphs: .venv/ready
	$(BIN)/python -m lenet.plots $(dir $(wildcard out/lenet/runs results/lenet/runs))

clean-run:
	rm -rf $(RUN)
