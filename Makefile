# The targets a newcomer needs; every one sets up .venv by itself when it is missing.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED = 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: run test lab env export clean

run: .venv/ready       ## train CLIP4Clip meanP and seqTransf on the embedded data set, print the comparison
	mkdir -p outputs/compare
	$(BIN)/papermill --no-progress-bar nbs/runs/compare.ipynb outputs/compare/compare.ipynb -y 'recipes: [shapes_meanP, shapes_seqTransf]'
	@cat outputs/compare/summary.txt

test: .venv/ready      ## export in sync, every page, every test
	bash tests/run_all.sh

lab: .venv/ready       ## JupyterLab on the tour
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/tour/clip4clip.ipynb

env: .venv/ready       ## only set up .venv

export: .venv/ready    ## notebooks -> vidlab/, README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/jupyter nbconvert --to markdown --output-dir . --output README.md nbs/index.ipynb

.venv/ready: settings.ini setup.py
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "vidlab needs Python 3.10 or newer; name one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .[dev]
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1 || true
	touch $@

clean:                 ## remove what runs made; keeps .venv
	rm -rf outputs
