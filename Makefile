# Everything runs in .venv, which the first call makes. `make help` lists the targets.
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu check bench cluster cluster-down e2e clean

help:  ## Print this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo:  ## Run the main job on a shipped example: a real model, shared documents, KV spilled to disk and back
	@scripts/environment agent,demo
	@$(BIN)/python examples/demo.py

# One process more than CPUs: some tests mostly wait, for leases to end or for a server.
test:  ## Run the default test suite
	@scripts/environment agent,dev,demo
	@$(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-gpu:  ## Run the suite of an NVIDIA GPU, where there is one (kernels compile: some ten minutes)
	@scripts/environment agent,dev,demo
	@$(BIN)/python -m pytest -m gpu -n 8 -rs

check:  ## ruff, a reason beside each ignored lint, mypy --strict, import-linter; changes nothing
	@scripts/environment agent,dev,demo
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@scripts/reasons
	$(BIN)/mypy
	$(BIN)/lint-imports

bench:  ## Compare with the CPU peers side by side (an hour; makes an environment for each under .bench/)
	@scripts/environment agent,bench
	$(BIN)/python benchmarks/offline.py

cluster:  ## A real Kubernetes cluster of three nodes on this machine, to try things with (root; prints the KUBECONFIG)
	@scripts/environment agent,dev,demo
	@PYTHONPATH=tests/cluster $(BIN)/python -m testcluster up

cluster-down:  ## Remove it, and whatever killed tests left behind
	@PYTHONPATH=tests/cluster $(BIN)/python -m testcluster down

e2e:  ## On a real cluster of three nodes: its faults, then docs/kubernetes.md as it stands there, from images to uninstall (root)
	@scripts/environment agent,dev,demo
	@$(BIN)/python -m pytest -m e2e -rs --durations=20

clean:  ## Remove the environment and all caches
	rm -rf .venv .bench .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
