PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Tests start hundreds of processes, and each would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install run test test-slow verify check docs bench-overhead bench-checkpoint bench-input bench-probe bench-scaling bench-memory bench-diagnose bench-report bench-sweep clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tensorboard,mlflow,wandb,trackio,report,sweep,deepspeed,bitsandbytes,torchao,dev]'
	touch $@

run: $(INSTALLED)
	$(BIN)/mptrain run recipes/digits-fp16.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m 'not slow and not verify'

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m 'slow and not verify'

verify: $(INSTALLED)
	$(BIN)/python -m pytest -m verify -s

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/terminal.py

bench-overhead: $(INSTALLED)
	$(BIN)/python benchmarks/overhead.py

bench-checkpoint: $(INSTALLED)
	$(BIN)/python benchmarks/checkpoint.py

bench-input: $(INSTALLED)
	$(BIN)/python benchmarks/input.py

bench-probe: $(INSTALLED)
	$(BIN)/python benchmarks/probe.py

bench-scaling: $(INSTALLED)
	$(BIN)/python benchmarks/scaling.py

bench-memory: $(INSTALLED)
	$(BIN)/python -m benchmarks.memory

bench-diagnose: $(INSTALLED)
	$(BIN)/python -m benchmarks.diagnose

bench-report: $(INSTALLED)
	$(BIN)/python -m benchmarks.report

bench-sweep: $(INSTALLED)
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.sweep_time

clean:
	rm -rf .venv build dist
