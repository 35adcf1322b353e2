# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Pinned here because it installs everything else; the same version stands in requirements.lock.
UV_VERSION := 0.13.8
DEMO ?= demo
VIDEOS ?=
# Compiled by whoever imports it first: all of it up front took 83 s, of which five files in six are never imported.
# Where this is set, as in many containers, every process would compile torch, Ray and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-long check lint types imports lock clean

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

demo: install  ## videos -> Ray -> a zarr cache and a page of pictures; VIDEOS=FOLDER takes your own
	$(BIN)/p4dprep demo $(DEMO) $(if $(VIDEOS),--videos $(VIDEOS))

# Two processes, see tests/conftest.py, on two cores: with more threads a training took five times its time in waiting.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-long: install  ## every fault at every storage operation, and the other exhaustive runs
	$(BIN)/python -m pytest -m slow

check: lint types imports

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

lock:  ## new pins; no index address is written
	$(BIN)/uv pip compile --quiet --universal --all-extras --generate-hashes --no-header --no-emit-index-url \
		--no-annotate --upgrade pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv $(DEMO)
