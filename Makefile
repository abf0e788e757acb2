# Everything is set up in .venv and nothing outside this folder is changed. Options of the programs go into ARGS:
#   make demo ARGS=--quick
PYTHON ?= python3
ARGS ?=
bin := .venv/bin

# What was interrupted, has lost its Python or was moved here from another folder is made from scratch; into a .venv that
# someone else made the packages are installed
state := $(shell if [ ! -x $(bin)/python ] || [ -f .venv/.started ]; then echo broken; elif [ ! -f .venv/.ready ]; then echo foreign; \
	elif [ "`cat .venv/.ready`" = "$(CURDIR)" ]; then echo ready; else echo broken; fi)

.PHONY: help setup demo test test-encoders bench bench-signal docs clean need-quarto
.DEFAULT_GOAL := help

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | awk -F '\t' '{printf "make %-14s %s\n", $$1, $$2}'

python_works = $(shell "$(PYTHON)" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null)
python_is_new = $(shell "$(PYTHON)" -c 'import sys; print("yes" if sys.version_info >= (3, 10) else "")' 2>/dev/null)
python_has_venv = $(shell "$(PYTHON)" -c 'import venv, ensurepip; print("yes")' 2>/dev/null)

ifneq ($(state),ready)
.PHONY: .venv/.ready
endif
.venv/.ready: settings.ini setup.py pyproject.toml constraints.txt
	@: $(if $(python_works),,$(error $(PYTHON) does not run. Give the Python to use (3.10 or newer), for instance: make setup PYTHON=python3.12))
	@: $(if $(python_is_new),,$(error $(PYTHON) is Python $(python_works), 3.10 or newer is needed. Give another one: make setup PYTHON=python3.12))
	@: $(if $(python_has_venv),,$(error $(PYTHON) comes without its venv module. Install it (Debian, Ubuntu: apt install python3-venv) and try again))
	@echo "Setting up .venv with Python $(python_works): one to five minutes, about 2 GB ..."
	@rm -f .venv/.ready
	@"$(PYTHON)" -m venv $(if $(filter broken,$(state)),--clear) .venv
	@$(if $(filter foreign,$(state)),:,touch .venv/.started)
	@$(bin)/python -m pip install -qq --no-input --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@printf '%s\n' "$(CURDIR)" > .venv/.ready && rm -f .venv/.started

setup: .venv/.ready ## make .venv with the tested versions of everything

demo: setup ## the whole job on simulated slides, with a report at the end; a second call resumes
	@$(bin)/crossfusion_demo $(ARGS)

# Two notebooks at a time, each with one thread, and tests alike: with two each they wait for one another and take many times longer
test: setup ## run all notebooks and all tests
	@OMP_NUM_THREADS=1 $(bin)/nbdev_test --n_workers 2 --do_print --timing
	@OMP_NUM_THREADS=1 $(bin)/python -m pytest tests -n 2 --dist worksteal $(ARGS)

# The encoders of timm and open_clip stay out of .venv, and their tests are skipped, until this is asked for
test-encoders: setup ## install the extra `encoders` and compare our encoders with timm's and open_clip's on small random weights
	@$(bin)/python -m pip install -qq --no-input --disable-pip-version-check -e '.[encoders]' -c constraints.txt
	@OMP_NUM_THREADS=1 $(bin)/python -m pytest tests/test_wsi.py -rs $(ARGS)

bench: setup ## all benchmarks
	@set -e; for f in benchmarks/*.py; do echo "== $$f"; $(bin)/python "$$f" $(ARGS); done

bench-signal: setup ## does the model find a signal that crosses scales, and the baseline not?
	@$(bin)/python benchmarks/signal_cross.py $(ARGS)

need-quarto:
	@: $(if $(shell command -v quarto),,$(error The site needs Quarto, which pip cannot install. Get it from https://quarto.org/docs/get-started and try again))

docs: need-quarto setup ## the documentation site, in _docs (needs Quarto)
	@$(bin)/python tools/readme.py
	@PATH="$(CURDIR)/$(bin):$$PATH" nbdev_docs

clean: ## remove what building leaves behind; .venv and results stay
	@rm -rf build dist _proc _docs .quarto nbs/.quarto .pytest_cache *.egg-info
	@find crossfusion nbs tests tools benchmarks -type d '(' -name __pycache__ -o -name .ipynb_checkpoints ')' -prune -exec rm -rf {} +
