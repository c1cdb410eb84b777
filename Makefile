# `make test` and `make demo` need Python 3.10 or newer, git and make, and set up the rest themselves.
PYTHON ?= python3
TOX := .venv/bin/tox
INTENTS := lint types architecture examples commands ranks-full parity-full faults bench

.PHONY: help tox test demo gpu multigpu clean $(INTENTS)

help:
	@echo "make demo   train a small GPT under ZeRO-2 on two ranks, resume it, and sample from it (3 minutes)"
	@echo "make test   unit, ranks and parity tests (10 minutes on two cores)"
	@echo "also:       $(INTENTS) gpu multigpu clean"

# Ranks wait for each other a good part of their time, so that two of these share two cores well; the longest begins first.
# The first of all installs what they test. Each runs whatever became of the others.
test: $(TOX)
	@failed=; \
	$(TOX) run -e unit || failed=1; \
	$(TOX) run-parallel --parallel 2 --parallel-live --skip-pkg-install -e ranks,parity,trainer,commands || failed=1; \
	test -z "$$failed"

demo $(INTENTS): $(TOX)
	$(TOX) run -e $@

tox: $(TOX)

$(TOX): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("meshbolt needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; name another with `make PYTHON=python3.12 ...`" if sys.version_info < (3, 10) else 0)'
	@echo "First use: tox into .venv now, then torch and the rest into .tox (minutes, as the network goes)."
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --constraint constraints.txt tox tox-ignore-env-name-mismatch
	@touch $@

# For a machine with a CUDA build of torch of its own, and perhaps no network: nothing is installed, `PYTHON` runs the
# sources as they stand (SOURCE= runs an installed meshbolt). Its versions are not the pinned ones, so that warnings of
# other packages do not fail a test there.
SOURCE ?= src
ON_GPU = PYTHONPATH="$(SOURCE)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)

gpu:
	$(ON_GPU) -m pytest tests/gpu -W default
	$(ON_GPU) benchmarks/run_gpu.py

multigpu:
	$(ON_GPU) -m pytest tests/multigpu -W default
	$(ON_GPU) benchmarks/run_gpu.py

clean:
	rm -rf .venv .tox build dist runs
