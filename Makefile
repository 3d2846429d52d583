# Two commands: `make chat` and `make test`. Nothing is needed but make, and Python 3.10 or newer with venv.
PYTHON ?= python3
VENV ?= .venv
# Which PyTorch: auto (keep one that fits; CUDA build where nvidia-smi lists a GPU; else CPU), cuda, cpu, skip
TORCH ?= auto
# Where CPU wheels for Linux are sought when pip's own configuration offers none
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# More words for `chatglm chat` and for pytest: make chat ARGS="--seed 0", make test PYTEST_ARGS="-k tokenizer"
ARGS ?=
PYTEST_ARGS ?=

BIN = $(VENV)/bin
INSTALL = $(PYTHON) scripts/install.py --venv $(VENV) --torch $(TORCH) --torch-index $(TORCH_INDEX)
INSTALL_INPUTS = pyproject.toml constraints.txt scripts/install.py
FOR_CHAT = $(VENV)/.installed-chat-$(TORCH)
FOR_TRAIN = $(VENV)/.installed-train-$(TORCH)
FOR_TEST = $(VENV)/.installed-test-$(TORCH)
SOURCES = src tests examples scripts
PINNED_ON = 2026-11-24
COVERED = src/chatglm/model/*,src/chatglm/tokenizer/*,src/chatglm/checkpoint/*

.PHONY: help chat train-demo test lint typecheck coverage constraints clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

chat: $(FOR_CHAT)  ## talk with the embedded model (installs it first, into .venv)
	@# on a terminal the chat gets its own process group: Ctrl-C is for the answer, not for make
	@if [ -t 0 ]; then set -m; fi; $(BIN)/chatglm chat $(ARGS) || [ $$? -eq 130 ]

train-demo: $(FOR_TRAIN)  ## a tiny model through every stage of training, with a report: minutes on two cores
	$(BIN)/python examples/training/demo.py --out out/train-demo

test: lint typecheck $(FOR_TEST)  ## everything that CI runs: format, lint, types, tests, coverage bounds
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered $(PYTEST_ARGS)
	$(BIN)/python -m coverage report --include='$(COVERED)' --fail-under=95 --format=total

lint: $(FOR_TEST)  ## ruff: format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: $(FOR_TEST)  ## mypy --strict on src
	$(BIN)/mypy

coverage: $(FOR_TEST)  ## the tests, and out/coverage/index.html: which lines they reach
	$(BIN)/python -m pytest -n 2 --cov --cov-report=html:out/coverage $(PYTEST_ARGS)

constraints:  ## write constraints.txt anew from pyproject.toml (needs uv); torch pins its own CUDA parts
	uv pip compile --quiet --universal --python-version 3.10 --all-extras --group dev --exclude-newer $(PINNED_ON) \
	  --no-annotate --no-header pyproject.toml | grep -vE '^(cuda|nvidia|triton)' > constraints.new
	@{ echo '# Made by `make constraints`: public versions, for CPU and CUDA builds of torch alike.'; cat constraints.new; } > constraints.txt
	@rm constraints.new

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist out .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(FOR_CHAT): $(INSTALL_INPUTS)
	@$(INSTALL) --extras chat,cpu
	@touch $@

$(FOR_TRAIN): $(INSTALL_INPUTS)
	@$(INSTALL) --extras chat,cpu,train
	@touch $@ $(FOR_CHAT)

$(FOR_TEST): $(INSTALL_INPUTS)
	@$(INSTALL) --extras chat,cpu,hf,serve,web,ray,train,eval,data --groups dev
	@touch $@ $(FOR_CHAT) $(FOR_TRAIN)
