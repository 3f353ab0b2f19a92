# Two commands: `make demo` sets up and runs everything end to end, `make test` sets up and checks everything.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
DOCKER ?= docker
# More for `docker build`: --secret id=pip.conf,src=FILE for a mirror, --build-arg TORCH_CPU=INDEX for other wheels, BASE=IMAGE.
BUILD ?=
COMMIT = $(shell git describe --always --dirty --abbrev=40 --exclude='*')

.PHONY: demo test bench images check-k8s clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/ffn synth .ffn/skeletons
	$(BIN)/ffn run --data .ffn/skeletons --preset S4-small --set training.epochs=12

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.compile
	$(BIN)/pytest -n 2 --dist loadgroup

bench: $(READY)
	$(BIN)/python -m benchmarks

# The manifests and CI files under checkers too heavy for every test run: checkov and zizmor in an environment of their own.
check-k8s: $(READY)
	test -x .venv/check/bin/checkov || { $(PYTHON) -m venv .venv/check && .venv/check/bin/pip install --quiet --disable-pip-version-check checkov zizmor; }
	$(BIN)/yamllint k8s compose.yaml .github
	mkdir -p .venv/rendered && for overlay in k8s/overlays/*; do kubectl kustomize $$overlay > .venv/rendered/$$(basename $$overlay).yaml || exit 1; done
	.venv/check/bin/checkov --directory .venv/rendered --framework kubernetes --quiet --compact --skip-download
	.venv/check/bin/zizmor --offline .github/workflows

images:
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD) --target cpu --build-arg COMMIT=$(COMMIT) --tag ffn-python:dev --tag ffn-python:$(COMMIT) .
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD) --target gpu --build-arg COMMIT=$(COMMIT) --tag ffn-python:dev-gpu --tag ffn-python:$(COMMIT)-gpu .

clean:
	rm -rf .venv .ffn
