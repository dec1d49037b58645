# Two commands: `make demo` trains, evaluates and generates; `make test` checks everything.
# `make bench` measures speed against bare matrix products and the peers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

.PHONY: demo test lint bench clean
.DEFAULT_GOAL := demo

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@

# About eight minutes on two cores: train on Python's own library, score beside xz, write, plot.
demo: $(VENV)/installed
	rm -rf $(RUN)
	$(BIN)/titans train --train.output_dir $(RUN)
	$(BIN)/titans eval --model $(RUN) --limit 1000000
	$(BIN)/titans generate --model $(RUN) --prompt "def read_lines(path):" --max_new_tokens 200
	@echo
	@echo "loss curve: $(RUN)/loss.png    checkpoint: $(RUN)"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# One thread a process: two processes share the cores better than their threads would.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

$(VENV)/bench-installed: $(VENV)/installed
	$(BIN)/pip install --quiet -e ".[bench]" -c constraints.txt
	touch $@

# About half an hour on two cores, which should have nothing else to do.
bench: $(VENV)/bench-installed
	$(BIN)/python benchmarks/operator.py --json runs/bench/operator.json
	$(BIN)/python benchmarks/training.py --json runs/bench/training.json

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
