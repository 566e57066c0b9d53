# `make` lists the targets. They need pip install -e ".[test]"; docs, coverage, mutation, sbom and audit need the extras docs, trust
# and release, too.
PYTHON ?= python
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null)

.PHONY: help test quality style docs soak coverage mutation promises trust licences wheel sbom audit

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test:  ## What CI runs of the tests; minutes on two cores
	$(PYTHON) -m pytest -n 2 --dist loadfile

quality:  ## Lint, format and types, changing nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

style:  ## What ruff can repair by itself, and the format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs:  ## site/: the documentation, every page and link checked (extra: docs)
	$(PYTHON) -m mkdocs build --strict

soak:  ## Faults and fuzzing for hours; DEEPLABZOO_RECORD=1 writes benchmarks/trust/*.json
	$(PYTHON) -m pytest -m soak tests/trust

coverage:  ## Lines and branches that CI's tests run, children included; about four times the tests' own time
	$(PYTHON) tests/trust/measure_coverage.py run
	$(PYTHON) tests/trust/measure_coverage.py loops
	$(PYTHON) tests/trust/measure_coverage.py report

mutation:  ## Small wrong changes of the modules that everything rests on, each to be noticed by their tests; hours
	for module in atrous manifest metrics labels cells; do $(PYTHON) tests/trust/mutation.py $$module; done

promises:  ## Wrong changes, each breaking one of docs/promises.md, to be noticed by the test named there; an hour
	$(PYTHON) tests/trust/promise_mutations.py

trust:  ## docs/trust.md from the records and from tests/trust/defects
	$(PYTHON) tests/trust/trust_page.py

licences:  ## docs/licences.md from installed metadata and the manifest
	$(PYTHON) tests/trust/licences_page.py

wheel:  ## dist/*.whl: the same bytes from the same commit, by the build tools of tests/trust/build-requirements.txt
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --require-hashes --only-binary :all: -r tests/trust/build-requirements.txt
	build/tools/bin/python -m hatchling build -t wheel -d dist

sbom: wheel  ## dist/*.cdx.json: what the wheel brings along, as CycloneDX
	$(PYTHON) tests/trust/sbom.py dist/deeplabzoo-*.whl

audit:  ## Known vulnerabilities of what the light install brings; needs the network
	$(PYTHON) tests/trust/audit.py
