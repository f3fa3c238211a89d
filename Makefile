# Start with `make demo` or `make test`. They need only Python, make and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO_SOURCE := fixtures/gpt2-stdlib
DEMO_OUTPUT := demo-out
OLD_ONNXRUNTIME := $(addprefix $(VENV)/onnxruntime-,1.16.3 1.17.3 1.18.1)
space := $(subst ,, )

.PHONY: campaign demo test test-fast test-old-onnxruntime test-web lint docs bench bench-scale fixtures clean
.DEFAULT_GOAL := demo

$(VENV)/base: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing gptconvert into $(VENV) (once) ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@echo "Installing the development tools into $(VENV) (once) ..."
	@$(PIP) --no-compile --editable '.[dev]'  # tests import few of its modules
	@touch $@

demo: $(VENV)/base  ## Convert and verify the bundled checkpoint, generate a line
	@$(BIN)/gptconvert openai-tf $(DEMO_SOURCE) --to onnx --to safetensors -o $(DEMO_OUTPUT) --force
	@echo
	@echo '$$ gptconvert generate $(DEMO_OUTPUT) "Objects are" --max-new-tokens 40'
	@$(BIN)/gptconvert generate $(DEMO_OUTPUT) "Objects are" --max-new-tokens 40

lint: $(VENV)/dev  ## Run ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## Lint, then run all tests but those of make campaign
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal -m "not campaign"

test-fast: $(VENV)/dev  ## Run the tests that are not marked slow, in under 90 s
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow and not campaign"

$(VENV)/onnxruntime-%:
	@test -x $@.part/bin/python || $(PYTHON) -m venv $@.part
	@$@.part/bin/pip --disable-pip-version-check install --quiet onnxruntime==$* 'numpy<2'
	@mv $@.part $@

test-old-onnxruntime: $(VENV)/dev $(OLD_ONNXRUNTIME)  ## Run exports in old versions of onnxruntime; needs Python 3.11
	GPTCONVERT_OLD_ONNXRUNTIME=$(subst $(space),:,$(addsuffix /bin/python,$(OLD_ONNXRUNTIME))) \
		$(BIN)/python -m pytest tests/targets/onnx/test_old_onnxruntime.py

tests/web/node_modules: tests/web/package-lock.json
	npm ci --prefix tests/web --ignore-scripts --no-audit --no-fund
	@touch $@

test-web: $(VENV)/dev tests/web/node_modules  ## Run exports in browsers, and the page of gptconvert web; needs Node 20 and Chromium
	$(BIN)/python -m pytest tests/web

docs: $(VENV)/dev  ## Write the generated pages, and build the site in build/site; a warning is an error
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_commands.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/site
	@echo "build/site/index.html"

campaign: $(VENV)/dev  ## Search for faults for two hours; QUICK=1 takes six minutes, STATE=FILE continues a run
	$(BIN)/python -m pytest tests/campaigns -m campaign
	$(BIN)/python -m campaigns $(if $(QUICK),--quick) $(if $(SEED),--seed $(SEED)) \
		$(if $(STATE),--state $(STATE)) $(if $(REPORT),--report $(REPORT))

bench: $(VENV)/dev  ## Compare speed with cp and PyTorch; needs about 30 GB of disk
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks variants

bench-scale: $(VENV)/dev  ## Measure memory against the number of layers at GPT-J 6B's shapes; SCALE="--layers 28" runs the whole model
	$(BIN)/python -m benchmarks scale $(SCALE)

fixtures: $(VENV)/dev  ## Regenerate the fixtures; a few minutes, most of them training
	$(BIN)/python -m fixtures.make

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
