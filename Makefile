# `make demo` and `make test` work in a fresh clone: they make (or reuse) their own environment.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a DSLR image of a hamburger
# tests at a time, each on one thread
WORKERS ?= auto
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-compat test-browser test-faults format pocket-shapes judge-report report pocket pocket-flow bench clean

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2 GB with a CPU build of torch, some minutes"
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python launch.py --config configs/lods-gs-embedding.yaml --config configs/pocket.yaml --train system.prompt_processor.prompt="$(PROMPT)"

test: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# What make test leaves out, to stay below ten minutes. The tests in a browser come after the others and
# one at a time: Chromium draws in software beside the run that it shows, which takes two cores.
test-slow: $(VENV)/.ready-dev
	@trap 'exit 130' INT; failed=0; export OMP_NUM_THREADS=1; set -x; \
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not browser" || failed=1; \
	$(BIN)/python -m pytest -m browser || failed=1; \
	exit $$failed

# The extension with the packages that upstream threestudio 0.2.3 pins, in an environment of its own.
# PYTHON must be 3.11: its tokenizers has no builds for later ones.
COMPAT := .venv-compat
COMPAT_TESTS := tests/compat/test_upstream.py tests/models/test_model_folders.py tests/compat/test_merge.py \
	tests/host/test_typed_sections.py tests/scores/test_formulas.py tests/methods/test_oracles.py \
	tests/methods/test_losses.py tests/methods/test_learned_part.py \
	tests/methods/test_refused_and_warned.py tests/methods/test_learned_files.py tests/methods/test_playground.py \
	tests/host/test_gs_system.py::test_shipped_configurations_run \
	tests/host/test_ngp_system.py::test_shipped_configurations_run tests/compat/test_original_configs.py
SHOWN := torch numpy diffusers transformers pytorch-lightning omegaconf peft

$(COMPAT)/.ready: requirements-compat.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/pip install -q -r requirements-compat.txt
	touch $@

test-compat: $(COMPAT)/.ready
	@$(COMPAT)/bin/python -c "import sys; from importlib.metadata import version; print('python', sys.version.split()[0]); [print(name, version(name)) for name in '$(SHOWN)'.split()]"
	$(COMPAT)/bin/python -m pytest -m '' $(COMPAT_TESTS)

# glb files and the live view in a real browser: needs Chromium, and npm, which gets three.js and
# model-viewer.
test-browser: $(VENV)/.ready-dev
	npm install --no-audit --no-fund --prefix tests/browser
	$(BIN)/python -m pytest -m browser tests/host/test_browser.py tests/browser

# Kills, signals, runs that start together, full disks, damaged and hostile files.
# `python -m tests.faults pairs --count 10` does one part.
test-faults: $(VENV)/.ready-dev
	$(BIN)/python -m tests.faults

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The models of real objects from nothing, with truth, judge and tables (fixed seed; days on two cores; goes on where
# it stopped). The objects come from Debian's package sweethome3d-furniture, which apt-get fetches; where it cannot:
# make pocket ASSETS=folder of the package or of its .sh3f files.
ASSETS ?=
POCKET := $(BIN)/python -m pocket.make $(if $(ASSETS),--assets "$(ASSETS)")
pocket: $(VENV)/.ready-dev
	$(POCKET) --stages render,truth,vae,vae-on,latents,unet,decoder,save,judge,report

# The flow transformer, from the same work folder.
pocket-flow: $(VENV)/.ready-dev
	$(POCKET) --stages render,vae,vae-on,latents,decoder,flow,save-flow

# Retrains the model pocket-shapes from nothing (fixed seed; a little under three hours on two cores), then judges it.
pocket-shapes: $(VENV)/.ready
	$(BIN)/python -m pocket.shapes.make

# The tables in pocket/shapes/results, from the models that are there.
judge-report: $(VENV)/.ready
	$(BIN)/python -m pocket.shapes.report

# The page of the comparison, from the tables in docs/evaluation.
report: $(VENV)/.ready
	$(BIN)/python -m evaluation.report

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/rasterize.py
	$(BIN)/python benchmarks/hashgrid.py
	$(BIN)/python benchmarks/mesh.py
	$(BIN)/python benchmarks/raymarch.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/guidance.py
	$(BIN)/python benchmarks/viewer.py

clean:
	rm -rf build outputs .threestudio_cache
