# make train: train the tiny preset, or the record's recipe where there is a GPU and FineWeb data.
# make test:  formatting, types, tests; those of minutes each, marked slow, are left to .ci/run.
# Each sets up .venv on first use, with any Python 3.12 or newer it can find.

VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet
READY := $(VENV)/.ready
EXTRAS ?= test

.PHONY: train test clean
train: $(READY)
	$(VENV)/bin/python scripts/train.py

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 -m "not slow"

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml scripts/find_python.sh
	python="$$(PYTHON=$(PYTHON) sh scripts/find_python.sh)" && "$$python" -m venv --clear $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	touch $@
