# Every target works from a fresh clone: the environment is made on first use and kept.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lab notebooks clean

demo: $(READY)            ## one experiment on the embedded oracle set, minutes on two cores
	$(BIN)/python -m soft_cifar.cli demo

test: $(READY)            ## everything CI runs; ends with "N passed, M failed, K skipped"
	$(BIN)/python -m pytest tests

lab: $(READY)             ## JupyterLab, with nbs/explore.ipynb open
	$(BIN)/jupyter lab nbs/explore.ipynb

notebooks: $(READY)       ## after an edit: export the module, run the lessons, rebuild the README
	$(BIN)/python tests/refresh.py

clean:                    ## the environment, the demo and caches; runs, reports and data stay
	rm -rf $(VENV) demo build *.egg-info .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "soft_cifar needs Python >= 3.10, $(PYTHON) is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,oracles]'
	@touch $@
