# `make` lists what there is. The first call installs the course into .venv; later ones start at once.
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# In containers one is often root, which Jupyter refuses unless told.
ROOT_OPTION := $(if $(filter 0,$(shell id -u)),--allow-root)
LESSONS := $(wildcard lessons/*.ipynb)

# A step that fails does not keep the next ones from running; make says at the end that it failed.
MAKEFLAGS += --keep-going

FAST := style outputs up-to-date units notebooks

.PHONY: help lab test test-all $(FAST) slow blank solutions model refuser real suffixes bench benchmark strip clean
.DEFAULT_GOAL := help

help:
	@echo "make lab        open the course in JupyterLab"
	@echo "make test       install all that the tests need, and run the fast ones and every lesson"
	@echo "make test-all   the same, and the slow tests"
	@echo "make solutions  build solutions/ from lessons/ and utils/, and run them"
	@echo "make model      make the instructions, the tokenizer and the model organism from nothing (half an hour)"
	@echo "make refuser    teach SmolLM2-135M-Instruct to refuse (40 minutes)"
	@echo "make real       record what a model does under the method: MODEL=folder RUN=name"
	@echo "make suffixes   search for adversarial suffixes for the organism (half an hour)"
	@echo "make bench      time the search and the traces: ratios, written to tests/BENCHMARK.md"
	@echo "make benchmark  compare the search for suffixes to nanogcg's"
	@echo "make strip      remove the outputs from lessons/, as they are committed"
	@echo "make clean      remove .venv and caches"

lab: .venv/course
	$(BIN)/python -m jupyterlab --LabApp.default_url=/lab/tree/lessons/00_meet_the_model.ipynb $(ROOT_OPTION)

test: $(FAST)
test-all: test slow blank

style: .venv/dev
	$(BIN)/ruff check .

outputs: .venv/dev
	$(BIN)/nbstripout --verify --keep-id $(LESSONS)

up-to-date: .venv/dev
	$(BIN)/python -m utils.solutions --check

units: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" tests

notebooks: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile lessons solutions

slow: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or hypothesis" --hypothesis-profile thorough tests

# The lessons as a learner first meets them.
blank: .venv/dev
	COURSE_MODEL=organism $(BIN)/python -m pytest -n 2 --dist loadfile lessons

solutions: .venv/dev
	$(BIN)/python -m utils.solutions

model: .venv/course
	$(BIN)/python data/make_model.py

refuser: .venv/dev
	$(BIN)/python data/make_refuser.py

# MODEL: a folder, GGUF file or hub id. RUN: a name for the record. OPTIONS: see data/make_real.py.
real: .venv/dev
	$(BIN)/python data/make_real.py $(MODEL) --run $(RUN) $(OPTIONS)
	$(BIN)/python data/make_real_card.py

suffixes: .venv/course
	$(BIN)/python data/make_suffixes.py

# OPTIONS, such as --model FOLDER --prompts FOLDER: see tests/benchmark.py.
bench: .venv/course
	$(BIN)/python tests/benchmark.py $(OPTIONS)

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
.venv/dev: EXTRAS := [dev]
.venv/course .venv/dev: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "The course needs Python 3.10 or later: make ... PYTHON=/path/to/it"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt -e ".$(EXTRAS)"
	@touch .venv/course $@
