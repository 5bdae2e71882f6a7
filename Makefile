# make run    every notebook, executed into build/, then the table of claims
# make test   the tests, on two processes of one thread each; then those in a browser, alone
# make lint   format, style, and which room may import which
# make html   the committed notebooks as web pages in build/html, with an index
# make lab    JupyterLab, opened at the first notebook
# make clean  removes build/ (keeps .venv and the cached model)
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export GOMP_SPINCOUNT ?= 20000# threads that wait do not hog a busy machine; see helpers/__init__.py

.PHONY: run test lint html lab clean
.DEFAULT_GOAL := run

run: $(VENV)/.installed
	$(PY) -m helpers run

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --ignore=tests/slow/browser
	$(PY) -m pytest tests/slow/browser

lint: $(VENV)/.installed
	$(PY) -m ruff format --check helpers tests notebooks data
	$(PY) -m ruff check helpers tests notebooks data
	$(VENV)/bin/lint-imports --no-cache

html: $(VENV)/.installed
	$(PY) -m helpers export

lab: $(VENV)/.installed
	$(PY) -m jupyterlab notebooks/00_start_here.ipynb

clean:
	rm -rf build

# The stamp is written last, so an interrupted installation is taken up again.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "The workbook needs Python 3.11 or newer: try make PYTHON=python3.12 (or install one)." >&2; exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements.txt
	@touch $@
