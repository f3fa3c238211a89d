# Two commands do everything: `make demo` and `make test`. Only Python, make and pip are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO_SOURCE := fixtures/gpt2-stdlib
DEMO_OUTPUT := demo-out

.PHONY: demo test test-fast lint docs bench bench-scale fixtures clean
.DEFAULT_GOAL := demo

$(VENV)/base: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing gptconvert into $(VENV) (once) ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@echo "Installing the development tools into $(VENV) (once) ..."
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/base  ## Convert the bundled checkpoint, verified, and let it write a line
	@$(BIN)/gptconvert openai-tf $(DEMO_SOURCE) --to onnx --to safetensors -o $(DEMO_OUTPUT) --force
	@echo
	@echo '$$ gptconvert generate $(DEMO_OUTPUT) "Objects are" --max-new-tokens 40'
	@$(BIN)/gptconvert generate $(DEMO_OUTPUT) "Objects are" --max-new-tokens 40

lint: $(VENV)/dev  ## Lint, type-check, check the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## Lint and run all tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-fast: $(VENV)/dev  ## Run the tests that are not marked slow: under 90 s
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

docs: $(VENV)/dev  ## Write docs/api.md from the docstrings
	$(BIN)/python docs/make_api.py

bench: $(VENV)/dev  ## Measure against cp and PyTorch; needs about 30 GB of disk
	$(BIN)/python -m benchmarks

bench-scale: $(VENV)/dev  ## Memory at GPT-J 6B's shapes against the number of layers; SCALE="--layers 28" does all of it
	$(BIN)/python -m benchmarks scale $(SCALE)

fixtures: $(VENV)/dev  ## Make the bundled checkpoints again
	$(BIN)/python -m fixtures.make all

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
