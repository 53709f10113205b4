# `make` lists what there is. The first call installs the course into .venv; later ones start at once.
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# In containers one is often root, which Jupyter refuses unless told.
ROOT_OPTION := $(if $(filter 0,$(shell id -u)),--allow-root)
LESSONS := $(wildcard lessons/*.ipynb)
SOLUTIONS := $(wildcard solutions/*.ipynb)

# One thread in each process: the tests run two at a time. And the lessons with the organism.
test: export OMP_NUM_THREADS = 1
test: export COURSE_MODEL =

.PHONY: help lab test solutions model suffixes benchmark strip clean
.DEFAULT_GOAL := help

help:
	@echo "make lab        open the course in JupyterLab"
	@echo "make test       install all that the tests need, and run them"
	@echo "make solutions  build solutions/ from lessons/ and utils/, and run them"
	@echo "make model      make the instructions, the tokenizer and the model organism from nothing (half an hour)"
	@echo "make suffixes   search for adversarial suffixes for the organism (half an hour)"
	@echo "make benchmark  compare the search for suffixes to nanogcg's"
	@echo "make strip      remove the outputs from lessons/, as they are committed"
	@echo "make clean      remove .venv and caches"

lab: .venv/course
	$(BIN)/python -m jupyterlab --LabApp.default_url=/lab/tree/lessons/00_meet_the_model.ipynb $(ROOT_OPTION)

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/nbstripout --verify --keep-id $(LESSONS)
	$(BIN)/python -m utils.solutions --check
	$(BIN)/python -m pytest -n 2 --dist worksteal tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=300 \
		$(LESSONS) $(SOLUTIONS)

solutions: .venv/dev
	$(BIN)/python -m utils.solutions

model: .venv/course
	$(BIN)/python data/make_model.py

suffixes: .venv/course
	$(BIN)/python data/make_suffixes.py

# Without what it depends on: it asks for an older transformers than the course's.
benchmark: .venv/course
	$(BIN)/python -m pip install --no-deps nanogcg==0.3.0
	$(BIN)/python tests/benchmark_suffixes.py

strip: .venv/dev
	$(BIN)/nbstripout --keep-id $(LESSONS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# The empty files .venv/course and .venv/dev stand for what is installed: the course, and what the tests need besides.
# Python compiles a module when it is first imported; pip would compile all of them, for half a minute.
.venv/dev: EXTRAS := [dev]
.venv/course .venv/dev: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "The course needs Python 3.10 or later: make ... PYTHON=/path/to/it"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".$(EXTRAS)"
	@touch .venv/course $@
