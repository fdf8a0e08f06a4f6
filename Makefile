# Everything runs in .venv, which the first call makes. `make help` lists the targets.
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help:  ## Print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo:  ## Run the main job on a shipped example: a real model, shared documents, KV spilled to disk and back
	@scripts/environment agent,demo
	@$(BIN)/python examples/demo.py

test:  ## Run the default test suite
	@scripts/environment agent,dev,demo
	@$(BIN)/python -m pytest

check:  ## ruff, mypy --strict, import-linter; changes nothing
	@scripts/environment agent,dev,demo
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench:  ## Compare with the CPU peers side by side (an hour; makes an environment for each under .bench/)
	@scripts/environment agent,bench
	$(BIN)/python benchmarks/offline.py

clean:  ## Remove the environment and all caches
	rm -rf .venv .bench .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
