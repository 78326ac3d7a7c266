# make train: set-up and a GPT that is pruned while it learns, in about two minutes; make test: set-up and all tests.

PYTHON ?= python3
BIN := .venv/bin
RUN := out/quickstart

.PHONY: train test bench setup clean-run

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
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

test: .venv/ready-for-tests
	$(BIN)/python -m pytest -q

bench: .venv/ready
	$(BIN)/python -m bench.train

clean-run:
	rm -rf $(RUN)
