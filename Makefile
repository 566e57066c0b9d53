# The long suites; what CI runs is in .ci/run.
.PHONY: soak
soak:  ## Faults and fuzzing for hours; DEEPLABZOO_RECORD=1 writes benchmarks/trust/*.json
	python -m pytest -m soak tests/trust
