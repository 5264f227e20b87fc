# Two commands on a fresh machine with Python >= 3.11: `make run` and `make test`. Both do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test fuzz kills bench fast wheel gallery profiles own-profiles lint types check clean

run: $(VENV)/.installed  ## the flagship scenario: where do the 23x come from?
	$(BIN)/chairlift run anyscale_23x

test: $(VENV)/.installed-dev  ## all tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile

fuzz: $(VENV)/.installed-dev  ## damaged files of every kind, each read to an answer or to one message (long)
	cd tests && ../$(BIN)/python fuzz.py scripted && ../$(BIN)/python fuzz.py 20000 1

kills: $(VENV)/.installed-dev  ## 200 kills of commands at random moments: nothing lost, nothing mixed (long)
	cd tests && ../$(BIN)/python kills.py 200 1

bench: $(VENV)/.installed  ## how fast the simulator is; writes bench.json (some five minutes)
	$(BIN)/python -m chairlift.sim.cli.bench

fast: $(VENV)/.installed  ## compile the core where it stands: the same results, sooner; needs a C compiler (up to four minutes)
	$(BIN)/python -m pip install --quiet --editable '.[fast]'
	$(BIN)/python .package/compile.py --optimise 3 --trained
	$(BIN)/chairlift version

wheel: $(VENV)/.installed  ## a wheel with the core compiled, for this Python and machine, in dist/
	$(BIN)/python -m pip install --quiet --editable '.[fast]'
	CHAIRLIFT_COMPILED=1 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

gallery: $(VENV)/.installed  ## pictures of the shipped scenarios' pages; needs a Chromium (some ten minutes)
	$(BIN)/python -m chairlift.sim.cli.gallery

# The shipped profiles again, from what was recorded: make profiles RECORDINGS=FOLDER, which holds h200-vllm-0.26
profiles: $(VENV)/.installed
	for summary in $(RECORDINGS)/h200-vllm-0.26/*_summary.json; do \
	  model=$$(basename $$summary _summary.json); \
	  case $$model in *-eagle3) continue;; esac; \
	  $(BIN)/chairlift calibrate --recording $$(dirname $$summary) --model $$model \
	    --out backend/calibrated/profiles/h200-$$model-vllm-0.26.json || exit 1; \
	done
	$(BIN)/chairlift calibrate --recording $(RECORDINGS)/h200-vllm-0.26 --model llama-3.1-8b-eagle3 \
	  --out backend/calibrated/profiles/h200-llama-3.1-8b-eagle3-vllm-0.26.json  # on top of the one without drafts

# Those of our own engine, from the grids beside it; the one with drafts last, on top of the one without
own-profiles: $(VENV)/.installed
	for model in llama-3.1-8b llama-3.1-8b-fp8 opt-13b qwen3-30b-a3b qwen3-30b-a3b-tp2-ep llama-3.1-8b-eagle3; do \
	  $(BIN)/chairlift calibrate --recording backend/gpu/measured/grid --model $$model \
	    --name h200-$$model-chairlift-0.1 --out backend/calibrated/profiles/h200-$$model-chairlift-0.1.json || exit 1; \
	done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types test

clean:
	find .package sim backend policies -name '*.so' -delete
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Chairlift needs Python 3.11 or newer; choose one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed
