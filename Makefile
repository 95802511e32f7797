# The targets a newcomer needs; every one sets up .venv by itself when it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/$(if $(NEWEST),newest,ready)
export PYTHONUNBUFFERED = 1
# kernels have this from the start: memory in large pages, see nbs/04_machine.ipynb
LARGE_PAGES = GLIBC_TUNABLES="$$($(BIN)/python -c 'import os, vidlab; print(os.environ["GLIBC_TUNABLES"])')"
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: run test lab env export constraints clean python $(if $(NEWEST),.venv/newest)

run: $(READY)          ## train CLIP4Clip meanP and seqTransf on the embedded data set, print the comparison
	@echo 'The first time, small videos are rendered and a tiny CLIP is trained (2 to 4 minutes).'
	@echo 'Then two models are trained and compared: 3 to 5 minutes on two idle cores.'
	$(BIN)/vidlab compare shapes_meanP shapes_seqTransf

test: $(READY)         ## export in sync, every page, every test
	bash tests/run_all.sh

lab: $(READY)          ## JupyterLab on the start page
	$(LARGE_PAGES) $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir='$(CURDIR)' nbs/tour/start.ipynb

env: $(READY)          ## only set up .venv; NEWEST=1: with the newest of everything instead of the tested versions

export: $(READY)       ## notebooks -> vidlab/, README.md
	$(BIN)/nbdev-export
	$(BIN)/python -c 'from vidlab.config import write_parameters; write_parameters("nbs/runs/train.ipynb")'
	$(BIN)/nbdev-clean
	$(BIN)/jupyter nbconvert --to markdown --output-dir . --output README.md nbs/index.ipynb

constraints: $(READY)  ## constraints.txt anew: the newest versions that fit together, for each Python
	bash tests/constraints.sh

python:                # one line, before anything is installed, where this Python is too old or too new
	@$(PYTHON) tests/which_python.py $(if $(NEWEST),any)

$(READY): settings.ini setup.py constraints.txt | python
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(NEWEST),--upgrade --upgrade-strategy eager,--constraint constraints.txt) -e .[dev]
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1 || true
	rm -f .venv/ready .venv/newest
	touch $@

clean:                 ## remove what runs made; keeps .venv
	rm -rf outputs
