# Python versions in the order of preference, and what goes into the environment. Megatron-Core 0.19 has no wheel
# for Python 3.14. The constraints make an environment the same on every machine and on every day.
PRIMARY = .venv 3.12 3.13 megatron report test dev -- --constraint .ci/constraints-primary.txt
OLDEST = .venv-oldest 3.11 3.10 megatron report test -- --constraint .ci/constraints-oldest.txt
# What the first one has, and Transformer Engine's own Python code on CPU.
ENGINE = .venv-te .venv
# The same with the Triton of public GPU images (it comes with torch 2.11), whose compiler differs.
TRITON = .venv-triton .venv triton==3.6.0
# 0.16.1 runs in the second environment; 0.19.2 is what the first one has.
VERSIONS ?= 0.16.1 0.17.1 0.18.2 0.19.2

PYTEST_ARGS ?=
# Processes that run tests, and the folder where they leave JUnit's reports.
WORKERS ?= 2
JUNIT ?=
QUICKSTART_ARGS ?=
COMPARE_ARGS ?=
GPU_ARGS ?=
HOST_ARGS ?=
SUITE_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help quickstart compare recipes unsupported environments lint test test-all test-primary test-te test-triton
.PHONY: test-oldest test-versions megatron-tests gpu host-time clean

help:
	@echo "make quickstart    train a tiny MoE without and with the losses, and write a report (about 5 minutes)"
	@echo "                   QUICKSTART_ARGS=\"--iterations 100\" and the like go to python -m examples.quickstart"
	@echo "make compare       run an experiment of docs/evidence, or a line of it: hours, or with COMPARE_ARGS=\"--tiny\" minutes."
	@echo "                   COMPARE_ARGS=\"--experiment text --arms both-10x --budget-minutes 60\" and the like go to"
	@echo "                   python -m examples.compare; interrupted, it goes on where it was"
	@echo "make recipes       judge public training recipes: what takes the losses as it is (docs/recipes.md; 20 seconds)"
	@echo "make unsupported   write what is not supported, from the list of rules, to docs/unsupported.md"
	@echo "make test          the quick tests, on the newest supported Megatron-Core (4 minutes);"
	@echo "                   WORKERS=8 sets the number of processes that run tests, here as in the next five"
	@echo "make test-all      all tests: the next four"
	@echo "make test-primary  on the newest supported Megatron-Core; PYTEST_ARGS=\"-k name\" goes to pytest"
	@echo "make test-te       on models of Transformer Engine's own Python code, on CPU"
	@echo "make test-triton   the kernels, compiled by an older Triton"
	@echo "make test-oldest   on the oldest supported Megatron-Core, 0.16.1, and Python 3.10 or 3.11"
	@echo "make lint          ruff and mypy, as before a commit"
	@echo "make test-versions the tests that need Megatron, on each release: $(VERSIONS)"
	@echo "make megatron-tests MEGATRON=path  Megatron's own tests of MoE layers, of a Megatron-LM checkout, without and with"
	@echo "                   the losses: whether any output or gradient differs by a bit (about 10 minutes)."
	@echo "                   SUITE_ARGS=\"--processes 2,4\" and the like go to tests/megatron_suite/run.py"
	@echo "make gpu           check and measure the kernels on a GPU, in 16 minutes; without one, try them on tiny shapes."
	@echo "                   GPU_ARGS=\"--parts layer,train\" and the like go to benchmarks/run.py. A python, or PYTHON=path,"
	@echo "                   that has torch, triton and megatron-core is used as it is, without pip"
	@echo "make host-time     measure the host time that the losses add to an MoE layer, without a GPU (about 5 minutes)."
	@echo "                   HOST_ARGS=\"--cases EP1:128/8 --root checkout\" and the like go to benchmarks/host_time.py"
	@echo "make clean         remove the environments and everything that was built"
	@echo "Each target makes the environment that it needs: .venv (Python 3.12 or 3.13) or .venv-oldest."

# Exit status 3 of .ci/venv: there is no interpreter of these versions.
define newest_environment
status=0; .ci/venv $(PRIMARY) || status=$$?; python=.venv/bin/python; \
if [ $$status -eq 3 ]; then \
    echo "No Python 3.12 or 3.13: going on with Megatron-Core 0.16.1, which has no training loop of its own."; \
    status=0; .ci/venv $(OLDEST) || status=$$?; python=.venv-oldest/bin/python; \
fi; \
[ $$status -eq 0 ] || exit $$status
endef

quickstart:
	@$(newest_environment); \
	exec $$python -m examples.quickstart $(QUICKSTART_ARGS)

compare:
	@.ci/venv $(PRIMARY)
	exec .venv/bin/python -m examples.compare $(COMPARE_ARGS)

recipes:
	@.ci/venv $(PRIMARY)
	exec .venv/bin/python -W ignore -m examples.recipes --write

unsupported:
	@.ci/venv $(PRIMARY)
	exec .venv/bin/python -W ignore -m examples.unsupported --write

# A file's tests run in one worker, so that what they share is made once.
PYTEST = OMP_NUM_THREADS=1 $(1) -m pytest -n $(WORKERS) --dist loadfile
junit = $(if $(JUNIT),--junitxml=$(JUNIT)/$(1).xml)

test:
	@$(newest_environment); \
	$(call PYTEST,exec $$python) -m "not slow" $(PYTEST_ARGS)

test-all:
	@status=0; \
	for tests in test-primary test-te test-triton test-oldest; do \
	    $(MAKE) --no-print-directory $$tests || { status=1; failed="$$failed $$tests"; }; \
	done; \
	for tests in $$failed; do echo "FAILED: make $$tests"; done; \
	exit $$status

test-primary:
	@.ci/venv $(PRIMARY)
	$(call PYTEST,.venv/bin/python) $(call junit,primary) $(PYTEST_ARGS)

# Of the other tests, those that build models of many kinds.
TE_TESTS = tests/te $(addsuffix .py,$(addprefix tests/integration/test_,gradients hooks hybrid row_check cuda_graphs lost_losses) \
    $(addprefix tests/programs/test_,programs_alone programs_on_ranks))
test-te:
	@.ci/venv $(PRIMARY)
	@.ci/transformer-engine $(ENGINE)
	$(call PYTEST,.venv-te/bin/python) $(call junit,te) $(TE_TESTS) $(PYTEST_ARGS)

test-triton:
	@.ci/venv $(PRIMARY)
	@.ci/borrow $(TRITON)
	$(call PYTEST,.venv-triton/bin/python) $(call junit,triton) tests/kernels/test_compile.py tests/kernels/test_launch.py $(PYTEST_ARGS)

oldest_tests = $(call PYTEST,.venv-oldest/bin/python) -m "not once" $(call junit,oldest) $(PYTEST_ARGS)
test-oldest:
	@status=0; .ci/venv $(OLDEST) || status=$$?; \
	if [ $$status -eq 3 ]; then \
	    echo "NOT TESTED: the oldest supported Megatron-Core, 0.16.1, for want of Python 3.10 or 3.11."; \
	    [ -z "$$CI" ]; exit; \
	fi; \
	[ $$status -eq 0 ] || exit $$status; \
	echo '$(oldest_tests)'; $(oldest_tests)

environments:
	@.ci/venv $(OLDEST) & oldest=$$!; \
	{ .ci/venv $(PRIMARY) && .ci/transformer-engine $(ENGINE) && .ci/borrow $(TRITON); } || { kill $$oldest; exit 1; }; \
	wait $$oldest || [ $$? -eq 3 ]

lint:
	@.ci/venv $(PRIMARY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test-versions:
	@.ci/venv $(PRIMARY)
	@.ci/venv $(OLDEST)
	@.venv/bin/python .ci/versions.py .venv .venv-oldest $(VERSIONS) -- $(PYTEST_ARGS)

megatron-tests:
	@[ -n "$(MEGATRON)" ] || { echo "Name a checkout of Megatron-LM: make megatron-tests MEGATRON=path"; exit 2; }
	@.ci/venv $(PRIMARY)
	.venv/bin/python tests/megatron_suite/run.py "$(MEGATRON)" $(SUITE_ARGS)

gpu:
	@for python in $${PYTHON:-python python3}; do \
	    "$$python" -c "import torch, triton, megatron" 2>/dev/null && break; \
	done || { .ci/venv $(PRIMARY) && python=.venv/bin/python; } || exit $$?; \
	echo "$$python benchmarks/run.py $(GPU_ARGS)"; \
	exec "$$python" benchmarks/run.py $(GPU_ARGS)

host-time:
	@.ci/venv $(PRIMARY)
	exec .venv/bin/python benchmarks/host_time.py $(HOST_ARGS)

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
