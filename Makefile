# make train: train the tiny preset, or the record's recipe where there is a GPU and FineWeb data.
# make test:  formatting, types, tests; those of minutes each, marked slow, are left to .ci/run.
# Each sets up .venv on first use, with any Python 3.12 or newer it can find; a .venv of yours is left alone.

VENV := .venv

.PHONY: train test clean
train:
	@PYTHON='$(PYTHON)' sh scripts/set_up.sh '$(VENV)' train
	'$(VENV)/bin/python' scripts/train.py
	@run=$$(ls -d -t runs/*/ | head -n 1) && echo && \
	echo "Look at $${run}loss.png, then at log.txt, metrics.jsonl and config.json beside it." && \
	echo "Let it write:    $(VENV)/bin/python scripts/sample.py $${run%/} --prompt 'It was'" && \
	echo "Change the run:  $(VENV)/bin/python scripts/train.py --help" && \
	echo "Read on:         README.md, 'Reading the code', and docs/block-sparse-attention.md"

test:
	@PYTHON='$(PYTHON)' sh scripts/set_up.sh '$(VENV)' test
	'$(VENV)/bin/python' -m ruff check .
	'$(VENV)/bin/python' -m ruff format --check .
	'$(VENV)/bin/python' -m mypy
	'$(VENV)/bin/python' -m pytest -n 2 --dist worksteal -m "not slow"

clean:
	@if [ ! -e '$(VENV)' ] || [ -e '$(VENV)/.jax_speedrun' ]; then rm -rf '$(VENV)'; \
	else echo "$(VENV) was not made by this Makefile and is left as it is" >&2; exit 1; fi
