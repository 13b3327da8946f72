# make setup: everything this project needs. The other targets run it first; when nothing changed it is done at once.

BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2 --dist loadfile

.PHONY: setup gate test lint bench soak clean

setup:
	@scripts/setup.sh

gate: setup
	$(BIN)/powercut gate

test: setup
	$(PYTEST)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/loops.py
	$(BIN)/python benchmarks/defects.py
	$(BIN)/python benchmarks/rescue.py
	$(BIN)/python benchmarks/quire_qcow2.py

soak: setup
	$(PYTEST) -m slow --hypothesis-profile=soak

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find rig format tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
