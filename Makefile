# Each command works on a machine that has only CPython >= 3.11 with venv: the first one creates
# .venv and installs, the next ones start at once. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOCK := requirements.lock
# Apart from the rest: it brings a docstring_parser of its own over the one that jsonargparse needs.
PYDOCLINT := $(VENV)/pydoclint
# make install LOCKED=1: the versions that were tested; otherwise the newest above the floors
CONSTRAINTS := $(if $(LOCKED),--constraint $(LOCK))

.PHONY: help install lock demo test test-fast coverage check docs dist format train-emoji train-emoji-styles rl rl-sudoku \
  rl-countdown rl-emoji rl-methods rl-table clean

help:
	@echo "make demo         draw, caption and inpaint with the bundled model: demo/index.html"
	@echo "make test         run the tests"
	@echo "make test-fast    run all but those marked slow, on two cores"
	@echo "make coverage     run the tests and show which branches of mmdlm they do not reach"
	@echo "make check        ruff, pydoclint and mypy"
	@echo "make docs         build the documentation into build/site, strictly"
	@echo "make dist         build and check what a release uploads: dist/"
	@echo "make format       let ruff rewrite what it can"
	@echo "make train-emoji  train the bundled model from nothing into runs/emoji"
	@echo "make rl           what reinforcement learning gains, on three tasks, with its curves: runs/rl"
	@echo "make lock         write the newest versions of all dependencies into $(LOCK)"
	@echo "make clean        remove what the commands wrote, except data and runs"

install: $(INSTALLED)

# The stamp is written last: an interrupted installation starts again.
$(INSTALLED): pyproject.toml $(if $(LOCKED),$(LOCK))
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "mmdlm: no '$(PYTHON)' found; install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mmdlm: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), but 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "mmdlm: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "mmdlm: installing into $(VENV); torch is large, so the first time takes minutes"
	$(BIN)/python -m pip install --disable-pip-version-check $(CONSTRAINTS) -e '.[vision,train,dev,docs]'
	@touch $@

# Of all extras, for every platform and Python from 3.11 on. What torch's builds for CUDA bring along
# is left to torch, which pins it: builds for other cards and for CPUs bring something else.
lock: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet uv
	$(BIN)/python -m uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --upgrade --no-header --no-annotate --quiet --output-file $(LOCK).new
	@{ echo "# Written by 'make lock'. Versions that are tested together; a constraints file of pip."; \
	  grep -vE '^(nvidia|cuda|triton)' $(LOCK).new; } > $(LOCK)
	@rm $(LOCK).new

demo: $(INSTALLED)
	$(BIN)/python -m eval.demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=1800 --timeout=1800 docs/tutorials

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A file stays with one worker, and its fixtures too. A worker takes one core: several threads of torch
# in each would wait for one another.
test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# What a release uploads: built as pip builds it, from the source distribution.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

coverage: $(INSTALLED)
	@mkdir -p build/coverage
	$(BIN)/python -m pytest --cov --cov-report term-missing:skip-covered

check: $(INSTALLED) $(PYDOCLINT)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	PYTHONPATH=$(PYDOCLINT) $(BIN)/python -m pydoclint.main mmdlm data_pipelines train eval
	$(BIN)/python -m mypy

$(PYDOCLINT): | $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --target $@.new 'pydoclint>=0.12'
	mv $@.new $@

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Every step skips or continues what is already there, so an interrupted run starts again with the
# same command.
EMOJI := runs/emoji
train-emoji: $(INSTALLED)
	$(BIN)/python -m data_pipelines.write_shards emoji --out $(EMOJI)/noto
	$(BIN)/python -m data_pipelines.text_tokenizer --shards $(EMOJI)/noto/train --out $(EMOJI)/text_tokenizer
	$(BIN)/python -m train.image_tokenizer --config configs/image_tokenizer/emoji.yaml
	$(BIN)/python -m data_pipelines.tokenize_images --shards $(EMOJI)/noto/train \
	  --tokenizer $(EMOJI)/image_tokenizer/final --out $(EMOJI)/codes/train
	$(BIN)/python -m train.pretrain --config configs/pretrain/emoji.yaml
	$(BIN)/python -m train.pretrain --config configs/pretrain/emoji_balanced.yaml
	$(BIN)/python -m eval.emoji --model $(EMOJI)/balanced/final --out $(EMOJI)/eval/emoji.json

# The same in three styles, with edits, questions and chats. ICONS is a folder in which npm has installed
# @iconify-json/twemoji, @iconify-json/fluent-emoji-flat and emojibase-data.
STYLES := runs/emoji_styles
ICONS := $(STYLES)/icons
train-emoji-styles: $(INSTALLED)
	$(BIN)/python -m data_pipelines.emoji_set --icons $(ICONS) --out $(STYLES)/images
	$(BIN)/python -m data_pipelines.text_tokenizer --size 4096 --out $(STYLES)/text_tokenizer \
	  --shards '["$(STYLES)/images/train", "$(STYLES)/images/tasks/train"]'
	$(BIN)/python -m train.image_tokenizer --config configs/image_tokenizer/emoji_styles.yaml
	for split in train tasks/train; do \
	  $(BIN)/python -m data_pipelines.tokenize_images --shards $(STYLES)/images/$$split \
	    --tokenizer $(STYLES)/image_tokenizer/final --out $(STYLES)/codes/$$split || exit; done
	$(BIN)/python -m train.pretrain --config configs/pretrain/emoji_styles.yaml
	$(BIN)/python -m eval.emoji.tasks --model $(STYLES)/model/final --images $(STYLES)/images

# What reinforcement learning gains. Each file is a target, so that each row can be made alone
# (make rl-sudoku), two runs can go on side by side (make -j2 rl: each takes one core), and what was
# interrupted goes on with the same command.
SEEDS := 0 1 2
METHODS := diffu_grpo unigrpo coupled trace wd1
.SECONDARY:
rl: rl-sudoku rl-countdown rl-emoji rl-methods
	$(MAKE) rl-table
rl-sudoku: $(SEEDS:%=runs/sudoku/eval/rl_%.json)
rl-countdown: $(SEEDS:%=runs/countdown/eval/rl_%.json)
rl-emoji: runs/emoji/eval/before.json $(SEEDS:%=runs/emoji/eval/rl_%.json)
rl-methods: $(foreach method,$(METHODS),$(SEEDS:%=runs/sudoku/eval/$(method)_%.json))
rl-table: $(INSTALLED)
	$(BIN)/python -m eval.reinforcement --config configs/eval/reinforcement.yaml

runs/sudoku/puzzles.csv: | $(INSTALLED)
	$(BIN)/python -m data_pipelines.sudoku --out $@ --count 20000
runs/countdown/problems.jsonl: | $(INSTALLED)
	$(BIN)/python -m data_pipelines.countdown --out $@ --count 100000
runs/sudoku/shards/index.json: runs/sudoku/puzzles.csv
	$(BIN)/python -m data_pipelines.write_shards conversations --source $< --out $(@D) \
	  --prompt Puzzle --completion Solution
runs/countdown/shards/index.json: runs/countdown/problems.jsonl
	$(BIN)/python -m data_pipelines.write_shards conversations --source $< --out $(@D) \
	  --prompt '{input}->{output}' --completion solution
runs/sudoku/text_tokenizer/tokenizer.json: runs/sudoku/shards/index.json  # a token a character
	$(BIN)/python -m data_pipelines.text_tokenizer --shards $(<D) --out $(@D) --size 257 \
	  --space_before false
runs/countdown/text_tokenizer/tokenizer.json: runs/countdown/shards/index.json  # one a number
	$(BIN)/python -m data_pipelines.text_tokenizer --shards $(<D) --out $(@D) --size 400 \
	  --space_before false

runs/%/sft/final/config.json: runs/%/text_tokenizer/tokenizer.json
	$(BIN)/python -m train.sft --config configs/sft/$*.yaml
runs/%/eval/sft.json: runs/%/sft/final/config.json
	$(BIN)/python -m eval.run --config configs/eval/$*.yaml --model $(<D) --out $@

# runs/TASK/RUN_SEED: one run of reinforcement learning
define run_of
runs/$(1)/$(2)_%/final/config.json: runs/$(1)/eval/sft.json
	$$(BIN)/python -m train.rl --config configs/rl/$(1).yaml $(3) --out runs/$(1)/$(2)_$$* \
	  --training.seed $$*
runs/$(1)/eval/$(2)_%.json: runs/$(1)/$(2)_%/final/config.json
	$$(BIN)/python -m eval.run --config configs/eval/$(1).yaml --model $$(<D) --out $$@
endef
$(foreach task,sudoku countdown,$(eval $(call run_of,$(task),rl,)))
$(foreach method,$(METHODS),$(eval $(call run_of,sudoku,$(method),\
  --config configs/rl/sudoku_methods.yaml --config configs/rl/sudoku_$(method).yaml)))

runs/emoji/noto/index.json: | $(INSTALLED)
	$(BIN)/python -m data_pipelines.write_shards emoji --out $(@D)
runs/emoji/rl_%/final/config.json: runs/emoji/noto/index.json
	$(BIN)/python -m train.rl --config configs/rl/emoji.yaml --out runs/emoji/rl_$* \
	  --training.seed $*
runs/emoji/eval/before.json: runs/emoji/noto/index.json
	$(BIN)/python -m eval.emoji --config configs/eval/emoji_rl.yaml --out $@
runs/emoji/eval/rl_%.json: runs/emoji/rl_%/final/config.json
	$(BIN)/python -m eval.emoji --config configs/eval/emoji_rl.yaml --model $(<D) --out $@

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .mypy_cache
