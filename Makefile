# make setup   make .venv, install everything, build the native parts (nothing to do where that is done)
# make demo    setup, then adapt the bundled source network to 100 images; options: make demo DEMO_ARGS="--steps 50"
# make test    setup, then every test
# make study   setup, then the papers' claims on small data, in at most 8 hours; stopped at any time, it continues:
#              make study STUDY_ARGS="--parts source,transfer --hours 1", or "--quick" for a few steps of everything
#
# VENV=path     another environment; one that is there already is used as it is and nothing is fetched
# PYTHON=name   the Python that makes .venv, 3.10 or later
# ADAFM_CUDA=0  leave the CUDA kernels out (they are built where nvcc is found)
PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
STUDY_ARGS ?=

STAMP := $(VENV)/.adafm-setup.stamp
LIBRARY := adafm_kernels/lib/libadafm.so
SOURCES := pyproject.toml setup.py CMakeLists.txt tools/make_environment.py $(wildcard cmake/*) $(shell find csrc -type f)

.PHONY: setup demo test bench study clean FORCE

setup: $(STAMP)

$(STAMP): $(SOURCES) $(if $(wildcard $(LIBRARY)),,FORCE)
	@command -v $(PYTHON) >/dev/null || { echo "setup: there is no $(PYTHON); name one: make setup PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) tools/make_environment.py "$(VENV)"
	@touch "$@"

demo: setup
	@"$(VENV)/bin/adafm" demo $(DEMO_ARGS)

# Triton reads TRITON_INTERPRET when it is imported, so its kernels run in a process of their own.
test: setup
	@"$(VENV)/bin/python" -m pytest $(TEST_ARGS)
	@TRITON_INTERPRET=1 "$(VENV)/bin/python" -m pytest -m triton $(TEST_ARGS)

bench: setup
	@"$(VENV)/bin/python" -m pytest benchmarks --benchmark-only

study: setup
	@"$(VENV)/bin/python" -m adafm_trainer.study $(STUDY_ARGS)

clean:
	rm -rf build dist *.egg-info $(LIBRARY) adafm_kernels/_C*.so "$(STAMP)"
