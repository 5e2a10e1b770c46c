# Every target makes .venv on first use; when it is there and up to date, nothing is installed.
# Variables: ARGS (passed on), PYTHON (which interpreter makes .venv), VENV (where), DSL_HOME (where runs go).

VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed
PIP := 26.3
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-fast notebooks figures docs demo study bench soak serve html lint format lock clean

help: ## this list
	@echo 'make TARGET [ARGS="..."]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-12s%s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install the pinned versions into it (the other targets do this by themselves)

LOGS := $(if $(DSL_HOME),$(DSL_HOME)/)logs
train: $(STAMP) ## run notebook 03, about three minutes: ARGS="-p max_steps 300 -p preset tiny"; again: goes on
	@mkdir -p "$(LOGS)"
	$(VENV)/bin/papermill --no-progress-bar notebooks/03_train.ipynb "$(LOGS)/03_train.out.ipynb" $(ARGS)
	@echo "curves and texts: $(LOGS)/03_train.out.ipynb; what there is now: $(VENV)/bin/dsl runs; to talk to it: $(VENV)/bin/dsl generate --help"

# A process for each core (not each thread), four at most: it takes up to 2 GB, and a file's tests stay together.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(STAMP) ## run the tests: ARGS="-k name" for some of them, ARGS="-m long" for the seven that take half a minute each
	$(PY) -m pytest tests $(PARALLEL) $(ARGS)

test-fast: $(STAMP) ## run the tests that take seconds, about a minute in all
	$(PY) -m pytest tests -m "not slow and not install" $(PARALLEL) $(ARGS)

notebooks: $(STAMP) ## run every notebook and renew the outputs in it (then: git diff, make test, commit)
	$(PY) tests/notebook_tools.py refresh $(or $(ARGS),$(NOTEBOOKS))

figures: $(STAMP) ## run every notebook and renew the committed figures
	DSL_FIGURES="$(CURDIR)/figures" $(PY) tests/notebook_tools.py run $(or $(ARGS),$(NOTEBOOKS))
	$(if $(ARGS),,DSL_TEST_FIGURES="$(CURDIR)/figures" $(PY) -m pytest -q tests/test_browser.py -k playground)

docs: $(STAMP) ## renew the computed tables of README.md and docs/
	$(PY) tests/doc_tables.py

demo: $(STAMP) ## renew checkpoints/demo from a trained run (ARGS=quickstart)
	$(PY) tests/make_demo.py $(ARGS)

study: $(STAMP) ## the trainings behind notebook 04, hours; goes on where it was: ARGS="--setting quick" takes minutes
	$(PY) -m dsl.study $(ARGS)

bench: $(STAMP) ## speed and memory beside transformers' models; writes figures/bench.json and its plot
	$(PY) tests/bench.py $(ARGS)

soak: $(STAMP) ## the long crash, kill and fault tests
	DSL_SOAK=1 $(PY) -m pytest tests -m soak -s $(ARGS)

serve: $(STAMP) ## REST server for the demo checkpoint: ARGS="--checkpoint checkpoints/quickstart"
	$(VENV)/bin/dsl serve $(ARGS)

html: $(STAMP) ## the notebooks as static pages under html/
	$(VENV)/bin/jupyter nbconvert --to html --output-dir html $(NOTEBOOKS)

lint: $(STAMP) ## ruff, over code and notebooks
	$(PY) -m ruff check . $(ARGS)
	$(PY) -m ruff format --check .

format: $(STAMP) ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)
lock: $(STAMP) ## renew requirements.txt from pyproject.toml: TORCH=2.13.0 holds torch, ARGS="-P name" renews one package
	@sed -n '/^#/!q;p' requirements.txt >$(VENV)/head.txt; echo 'torch==$(TORCH)' >$(VENV)/torch.txt
	@grep -v '^#' requirements.txt >$(VENV)/lock.txt
	$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --all-extras \
	    --no-annotate --no-header --no-emit-package pip $(or $(ARGS),--upgrade) \
	    --output-file $(VENV)/lock.txt pyproject.toml $(VENV)/torch.txt
	@sed -E -e '/^nvidia-ml-py=/b' -e '/^(nvidia-|cuda-|triton==)/d' $(VENV)/lock.txt | cat $(VENV)/head.txt - >$(VENV)/new.txt
	@cmp -s $(VENV)/new.txt requirements.txt || mv $(VENV)/new.txt requirements.txt
	@git --no-pager diff --stat -- requirements.txt

clean: ## remove what tools left behind; runs, logs, caches of data and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist html *.egg-info
	find dsl tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip compiles what it installs on one core and that is half of its time, so it is done here on all of them (some
# packages carry templates that do not compile: no error). Old versions of pip need three times as long to resolve.
# Candidates for Python are tried, not only looked up: a version manager's shim can exist and refuse to start.
$(STAMP): requirements.txt
	@python=; \
	for p in $(or $(PYTHON),python3.11 python3 python); do \
	    if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "make: needs Python 3.11 or newer, found none; install it, or: make PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "make: $$python has no ensurepip; install it (on Debian: apt-get install python3-venv)" >&2; exit 1; fi; \
	echo "make: installing into $(VENV), some minutes on the first time"; rm -f $@; \
	"$$python" -m venv $(VENV) && $(PY) -m pip install --quiet --disable-pip-version-check pip==$(PIP) || exit 1; \
	{ $(PY) -m pip install --no-compile -r requirements.txt -e . && touch $@; } | \
	    sed '/^Requirement already /d; /^Ignoring /d; /^ /d; s/^\(Installing collected packages\):.*/\1/'; \
	if [ ! -e $@ ]; then \
	    command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || \
	        echo "make: there is no C compiler, which some package may want; install one (on Debian: apt-get install gcc python3-dev)" >&2; \
	    exit 1; fi
	@$(PY) -m compileall -qq -j 0 $(VENV)/lib >/dev/null || true
