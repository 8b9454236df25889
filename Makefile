# Two commands matter: `make demo` and `make test`. Both set up .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
GPU_VENV ?= $(if $(DRY),.venv,.venv-gpu)

.PHONY: help install demo lab test gpu-check lint docs export readme clean
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: .venv/.installed ## Set up .venv (pip, with constraints.txt)
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed ## The story in six to ten minutes: critic, weighted and unweighted policy, what each can do
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m weighted_mtp.demo

lab: .venv/.installed ## Open JupyterLab on the launch form
	PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab nbs/launch.ipynb

test: .venv/.installed ## Everything CI runs: packages, lint, notebooks, pytest (which also checks export and site)
	$(BIN)/python -m pip check
	$(BIN)/ruff check -q weighted_mtp tests docs
	PATH="$(CURDIR)/$(BIN):$$PATH" $(ONE_THREAD) nbdev-test --n-workers 2 --timing
	PATH="$(CURDIR)/$(BIN):$$PATH" $(ONE_THREAD) python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
		--durations 40

# A thread each: threads that wait by spinning slow a busy machine down tenfold. Three at a time: many tests wait for others
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

gpu-check: $(GPU_VENV)/.installed ## Numbers, speed, memory on this machine's GPU, in ten minutes (DRY=1: on a CPU)
	$(GPU_VENV)/bin/python -m weighted_mtp.gpu_check $(if $(DRY),--dry) $(ARGS)

# On a GPU machine its own torch is used, wherever its Python has it: a second one would be gigabytes to fetch
.venv-gpu/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import torch' || { echo 'No torch in $(PYTHON): make gpu-check PYTHON=..., or GPU_VENV=.venv'; exit 1; }
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	$(PYTHON) -c 'import torch; print(torch.__path__[0].rpartition("/")[0])' \
		> `echo .venv-gpu/lib/python*/site-packages`/machine.pth
	sed "s/^torch==.*/torch==`$(PYTHON) -c 'import torch; print(torch.__version__)'`/" constraints.txt \
		> .venv-gpu/constraints.txt
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
		print(*p["project"]["dependencies"], sep="\n")' | grep -v '^torch' > .venv-gpu/requirements.txt
	.venv-gpu/bin/python -m pip install -q --disable-pip-version-check -c .venv-gpu/constraints.txt \
		-r .venv-gpu/requirements.txt
	.venv-gpu/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

export: .venv/.installed ## After editing notebooks: modules, clean notebooks, README.md
	PATH="$(CURDIR)/$(BIN):$$PATH" sh -c 'nbdev-export && nbdev-clean && $(MAKE) readme'

readme: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" jupyter nbconvert --to markdown --output-dir . --output README nbs/index.ipynb --log-level WARN

lint: .venv/.installed ## Likely mistakes and unused names (ruff)
	$(BIN)/ruff check -q weighted_mtp tests docs

docs: .venv/.installed ## Build the documentation site: site/index.html
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build -q -d '$(SITE)'
	@echo 'Open $(SITE)/index.html'
SITE ?= $(CURDIR)/site

clean: ## Remove what runs leave behind (records, checkpoints, data); .venv stays
	rm -rf storage mlruns site && find runs -mindepth 1 -not -name README.md -delete
