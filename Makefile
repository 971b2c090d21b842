# make demo: install and write text with the built-in model.  make test, make lint, make fuzz,
# make demo-model: as they say.  make nvrtc: compile the GPU kernels for every GPU, without one.
# Each creates what it needs on a fresh machine: Python 3.11+ with venv and pip.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-model test lint nvrtc fuzz clean

demo: .venv/installed
	$(BIN)/infer --demo -p "In the beginning" -n 64 --temp 0.7 --seed 11

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2

nvrtc: .venv/installed-test
	$(BIN)/pip install --quiet --editable ".[nvrtc]"
	$(BIN)/python -m pytest -n 2 tests/test_nvrtc.py

# The finished demo model from the checkpoint beside it.
demo-model: .venv/installed-test
	$(BIN)/pip install --quiet --editable ".[train]"
	$(BIN)/python -m powerinfer.tools.demo_model

SECONDS := 60
fuzz: .venv/installed-test
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/check
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/check .
	$(BIN)/mypy build/check/powerinfer

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet "setuptools>=77" wheel --editable ".[test,lint]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
