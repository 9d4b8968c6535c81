# breastcli: `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= auto
BIN := $(VENV)/bin
# The pinned versions are those of Python 3.11; an older one takes the newest that suit it.
PINS := $(shell $(PYTHON) -c 'import sys; print("--constraint constraints.txt" * (sys.version_info >= (3, 11)))')
STAMP := $(VENV)/.installed
DEMO := runs/demo
BENCH_ARCHS ?=

.PHONY: help install demo lint format test test-faults test-gpu bench clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## install breastcli and its development tools into .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "breastcli needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## draw the sample data set and run the whole chain on it
	$(BIN)/breastcli prepare $(DEMO)/raw --dataset sample --out $(DEMO)/data --size 96 --stain macenko --overwrite
	$(BIN)/breastcli train --arch timm/resnet10t --data $(DEMO)/data --out $(DEMO)/run --device $(DEVICE) \
	  --epochs 12 --lr 1e-3 --schedule cosine --augment light --imbalance weights --overwrite
	$(BIN)/breastcli evaluate $(DEMO)/run --device $(DEVICE) --overwrite
	$(BIN)/breastcli explain $(DEMO)/run --device $(DEVICE) --method dtgradcam,gradcam --masks $(DEMO)/raw/masks \
	  --num 24 --target malignant --overwrite
	$(BIN)/breastcli predict $(DEMO)/run $(DEMO)/raw/BreaKHis_v1/histology_slides/breast/benign/SOB/adenosis \
	  --out $(DEMO)/predictions.csv --device $(DEVICE) --overwrite
	$(BIN)/breastcli synthesize fit --data $(DEMO)/data --out $(DEMO)/gan --device $(DEVICE) \
	  --width 8 --batch-size 8 --kimg 3 --snapshot 0.25 --on-collapse warn --overwrite
	$(BIN)/breastcli synthesize generate $(DEMO)/gan --out $(DEMO)/synthetic --device $(DEVICE) --overwrite
	$(BIN)/breastcli synthesize assess $(DEMO)/gan --features $(DEMO)/run --device $(DEVICE) --overwrite
	$(BIN)/breastcli train --arch timm/resnet10t --data $(DEMO)/data --extra $(DEMO)/synthetic --out $(DEMO)/run-extra \
	  --device $(DEVICE) --epochs 6 --lr 1e-3 --schedule cosine --augment light --imbalance weights --overwrite
	$(BIN)/breastcli evaluate $(DEMO)/run-extra --device $(DEVICE) --overwrite
	$(BIN)/breastcli report $(DEMO)/run $(DEMO)/run-extra --out $(DEMO)/report --overwrite
	@echo
	@echo "The sample data set is drawn by a program: its figures say that the chain works, nothing about tissue."
	@echo "contact sheet  $(DEMO)/data/contact_sheet.png"
	@echo "training run   $(DEMO)/run"
	@echo "explanations   $(DEMO)/run/explain/dtgradcam-gradcam/gallery.png"
	@echo "predictions    $(DEMO)/predictions.csv"
	@echo "generator      $(DEMO)/gan/report.html"
	@echo "synthetic      $(DEMO)/synthetic/contact_sheet.png"
	@echo "trained on it  $(DEMO)/run-extra/report.html"
	@echo "both runs      $(DEMO)/report/report.html"
	@echo "report         $(DEMO)/run/report.html"

lint: $(STAMP)  ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint  ## install, lint and run every test that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-faults: $(STAMP)  ## kill, starve and damage every job by the hundred (most of an hour), and print how often
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal

test-gpu: $(STAMP)  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(STAMP)  ## measure three networks (or BENCH_ARCHS), and the hot paths beside what a user would otherwise run
	$(BIN)/breastcli benchmark all $(if $(BENCH_ARCHS),--archs $(BENCH_ARCHS)) --out runs/benchmark --device $(DEVICE) --overwrite

clean:  ## remove the environment, caches and the demo's output
	rm -rf $(VENV) .pytest_cache .ruff_cache breastcli.egg-info $(DEMO)
	find breastcli tests -name __pycache__ -type d -exec rm -rf {} +
