# Every target works from a fresh clone: the environment is made on first use and kept.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test soak lab notebooks benchmark budget site wheelhouse clean

demo: $(READY)            ## one SNGP run on the embedded oracle set, minutes on two cores
	@rm -rf demo && mkdir demo
	$(BIN)/papermill nbs/train.ipynb demo/train.ipynb -p preset demo -p method sngp -p output demo/runs
	@$(BIN)/jupyter nbconvert --log-level ERROR --to html demo/train.ipynb
	@echo "Done. Open demo/train.html in a browser."

test: $(READY)            ## everything CI runs, two tests at a time with a thread each; ends with "N passed, M failed, K skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses 2

MINUTES ?= 10
soak: $(READY)            ## kill studies and damage files for $MINUTES minutes; fails at the first number that changes in silence
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

lab: $(READY)             ## JupyterLab, with nbs/explore.ipynb open
	$(BIN)/jupyter lab nbs/explore.ipynb

notebooks: $(READY)       ## after an edit: export the module, run the lessons, rebuild the README
	$(BIN)/nbdev_export
	$(BIN)/python -c 'from soft_cifar import parameters; parameters.write_parameters_cell()'
	$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace nbs/[0-9]*.ipynb nbs/index.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python -m soft_cifar.site readme

benchmark: $(READY)       ## measure this machine and write report/benchmark/, minutes
	$(BIN)/python -m soft_cifar.benchmark everything report/benchmark
	$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace nbs/benchmark.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python -m soft_cifar.site benchmark

budget: $(READY)          ## how to spend a budget of annotations, on the features of runs/pretrain; half an hour on two cores
	$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace nbs/budget.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python -m soft_cifar.site budget

site: $(READY)            ## lessons and reports as pages, in _site/; open _site/index.html
	$(BIN)/python -m soft_cifar.site _site

# The report, and its pyarrow and JupyterLab, stay at home.
HOST_PYTHON ?= 3.12
HOST_HAS ?= numpy
WHEELS := matplotlib seaborn jinja2 pandas scipy pyyaml distributed ipykernel psutil papermill
wheelhouse: $(READY)      ## what an offline Linux host with torch, torchvision and $HOST_HAS lacks: make wheelhouse HOST_PYTHON=3.12 HOST_HAS="numpy scipy"
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --dest wheelhouse --constraint constraints.txt --only-binary :all: \
	    --python-version $(HOST_PYTHON) $(addprefix --platform ,manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux2014_x86_64 manylinux_2_17_x86_64) $(WHEELS)
	rm -f $(foreach name,$(HOST_HAS),wheelhouse/$(name)-*.whl)
	@du -sh wheelhouse

clean:                    ## the environment, the demo and caches; runs, reports and data stay
	rm -rf $(VENV) demo build *.egg-info .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "soft_cifar needs Python >= 3.10, $(PYTHON) is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebook,dev,oracles]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchattacks==3.5.1
	@touch $@
