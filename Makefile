# The long suites and what a release needs; what CI runs is in .ci/run. Extras: trust, release (pip install -e ".[trust,release]").
PYTHON ?= python
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null)

.PHONY: soak coverage mutation trust licences wheel sbom audit

soak:  ## Faults and fuzzing for hours; DEEPLABZOO_RECORD=1 writes benchmarks/trust/*.json
	$(PYTHON) -m pytest -m soak tests/trust

coverage:  ## Lines and branches that CI's tests run, children included; about four times the tests' own time
	$(PYTHON) tests/trust/measure_coverage.py run
	$(PYTHON) tests/trust/measure_coverage.py loops
	$(PYTHON) tests/trust/measure_coverage.py report

mutation:  ## Small wrong changes of the modules that everything rests on, each to be noticed by their tests; hours
	for module in atrous manifest metrics labels cells; do $(PYTHON) tests/trust/mutation.py $$module; done

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
