# make demo     adapt the bundled model live, evaluate it, show one coloured answer (about 7 minutes on 2 CPU cores)
# make test     the whole test suite, offline
# make quality  ruff and mypy
# Each target first sets up .venv; a second run reuses it.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test quality clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(VENV)/bin/mtp-trl demo

# One thread per worker: the models are tiny, and two processes with two threads each fight over two cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

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
	rm -rf $(VENV) build dist demo_out *.egg-info
