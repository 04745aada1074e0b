PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= outputs/demo
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

.PHONY: help
help: ## say what the targets do
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $(STAMP)

.PHONY: venv
venv: $(STAMP) ## make the virtual environment with the tested versions

.PHONY: demo
demo: $(STAMP) ## train a ViT on handwritten digits by Trainer, then by LGPTrainer, and compare them
	$(PY) examples/demo.py --output_dir $(OUTPUT) $(ARGS)

.PHONY: demo-quick
demo-quick: $(STAMP) ## the same by LGPTrainer alone
	$(PY) examples/demo.py --output_dir $(OUTPUT) --only LGPTrainer $(ARGS)

.PHONY: train
train: $(STAMP) ## train on your own data: make train OUTPUT=outputs/mine ARGS="--train_dir images/train"
	$(PY) examples/train_vit.py --output_dir $(OUTPUT) $(ARGS)

.PHONY: test
test: $(STAMP) ## run the test suite
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: test-slow
test-slow: $(STAMP) ## run the longer checks
	$(PY) -m pytest -m slow

.PHONY: test-device
test-device: $(STAMP) ## run training steps on a simulated GPU, which shows every wait for the device; needs g++
	PYTHONPATH=tests/device $(PY) -m pytest -p guard -m device tests/device

.PHONY: commands
commands: $(STAMP) ## run the commands of README, docs and examples as written, those that need no network
	$(PY) -m pytest -m commands

.PHONY: package
package: $(STAMP) ## build sdist and wheel and try them in an empty environment
	VENV=$(VENV) PYTHON=$(PYTHON) bash .ci/package

.PHONY: versions
versions: ## run the suite on the oldest and the newest versions of what it needs
	bash .ci/versions

.PHONY: cards
cards: $(STAMP) ## train the models of model_cards/ again: make cards CIFAR=folder
	$(PY) model_cards/make_cards.py --cifar10 $(CIFAR)

.PHONY: lint
lint: $(STAMP) ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.PHONY: types
types: $(STAMP) ## check types
	$(PY) -m mypy

.PHONY: gpu-check
gpu-check: gpu-check-correct gpu-check-speed ## both stages on the GPU at hand, in 15 minutes: make gpu-check PY=python3 CIFAR=folder

.PHONY: gpu-check-correct
gpu-check-correct: ## gradients, half precision, compiled blocks and waiting, in 5 minutes
	timeout 300 $(PY) -m pytest -m gpu -p no:cacheprovider -x tests/test_gpu.py

.PHONY: gpu-check-speed
gpu-check-speed: ## times of steps beside those on paper, memory, and time to accuracy, in 10 minutes
	PYTHONPATH=. timeout 600 $(PY) benchmarks/gpu_check.py $(if $(CIFAR),--data $(CIFAR))

.PHONY: probe
probe: $(STAMP) ## find out whether predictions pay for the demo's model
	$(VENV)/bin/hf-lgp probe examples/demo.py --output_dir $(OUTPUT)

.PHONY: docs
docs: $(STAMP) ## build the documentation's site in site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
