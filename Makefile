# make setup | test | lint | fmt | demo | crash | bench | bench-boot | bench-compression | clean
#     (ARGS="-k name" goes to pytest, ARGS="--random 200" to crash)
.PHONY: crash bench bench-boot bench-compression setup test lint fmt demo clean
BIN := .venv/bin

setup:
	@bash tools/setup.sh

test: setup
	@$(MAKE) --no-print-directory lint
	@bash tools/test.sh $(ARGS)

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fmt:
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup
	@$(BIN)/python -m bench.run $(ARGS)

bench-boot: setup
	@$(BIN)/python bench/boot.py $(ARGS)

bench-compression: setup
	@$(BIN)/python bench/compression.py $(ARGS)

crash: setup
	@PYTHONPATH=tests $(BIN)/python -m tools.crash $(ARGS)

demo: setup
	@$(BIN)/python tools/demo.py $(ARGS)

clean:
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache agent/build tracker/build build dist
