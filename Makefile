# Each command works on a machine that has only CPython >= 3.11 with venv: the first one creates
# .venv and installs, the next ones start at once. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test check format train-emoji clean

help:
	@echo "make demo         draw, caption and inpaint with the bundled model: demo/index.html"
	@echo "make test         run the tests"
	@echo "make check        ruff and mypy"
	@echo "make format       let ruff rewrite what it can"
	@echo "make train-emoji  train the bundled model from nothing into runs/emoji"
	@echo "make clean        remove what the commands wrote, except data and runs"

install: $(INSTALLED)

# The stamp is written last: an interrupted installation starts again.
$(INSTALLED): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "mmdlm: no '$(PYTHON)' found; install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mmdlm: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), but 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "mmdlm: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "mmdlm: installing into $(VENV); torch is large, so the first time takes minutes"
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[vision,train,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m eval.demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy mmdlm

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Every step skips or continues what is already there, so an interrupted run starts again with the
# same command.
EMOJI := runs/emoji
train-emoji: $(INSTALLED)
	$(BIN)/python -m data_pipelines.write_shards emoji --out $(EMOJI)/pictures
	$(BIN)/python -m data_pipelines.text_tokenizer --shards $(EMOJI)/pictures/train --out $(EMOJI)/text_tokenizer
	$(BIN)/python -m train.image_tokenizer --config configs/image_tokenizer/emoji.yaml
	$(BIN)/python -m data_pipelines.tokenize_images --shards $(EMOJI)/pictures/train \
	  --tokenizer $(EMOJI)/image_tokenizer/final --out $(EMOJI)/codes/train
	$(BIN)/python -m train.pretrain --config configs/pretrain/emoji.yaml
	$(BIN)/python -m eval.emoji --model $(EMOJI)/model/final --out $(EMOJI)/eval/emoji.json

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .mypy_cache
