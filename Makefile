# Everything a newcomer types. Each target makes its own virtual environment in .venv first.
PYTHON ?= python3
# A pinned torch: without a version, Linux gets the newest CUDA build, several gigabytes of it.
# For another build: make test TORCH='torch==2.11.0', or TORCH='--index-url <your index> torch'.
TORCH ?= torch==2.13.0
# CUDA builds of torch bring their own; without a GPU it is for the tests, which interpret it.
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.7.1)
BIN := .venv/bin
SOURCES := $(wildcard csrc/*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test slow lint table speed readme clean

help:
	@echo "make demo   train with and without selection on Fashion-MNIST, print what it pays (about 8 minutes)"
	@echo "make test   the tests and the documentation's examples"
	@echo "make slow   the install matrix: with and without compilers, editable, from the sdist"
	@echo "make lint   ruff, mypy, clang-format, codespell"
	@echo "make table  the full table behind the README (hours, resumes)"
	@echo "make speed  kernels against eager torch"
	@echo "make readme the README's figures, from bench/results"

.venv/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "activesel needs Python >= 3.10")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) $(TRITON)
	@touch $@

.venv/ready: .venv/torch pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[loop,test]'
	@touch $@

.venv/lint: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[lint]'
	@touch $@

demo: .venv/ready
	$(BIN)/python -m bench demo

test: .venv/ready
	$(BIN)/python -m pytest tests activesel --doctest-modules -m "not slow"

slow: .venv/ready
	$(BIN)/python -m pytest tests -m slow

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) tests/emulator/cuda_runtime.h tests/emulator/shim.cpp
	$(BIN)/codespell

table: .venv/ready
	$(BIN)/python -m bench classify

speed: .venv/ready
	$(BIN)/python -m bench speed

readme: .venv/ready
	$(BIN)/python -m bench readme

clean:
	rm -rf .venv build *.egg-info activesel/_C*.so
