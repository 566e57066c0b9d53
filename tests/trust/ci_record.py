"""What CI took, from its tests' JUnit file: `DEEPLABZOO_RECORD=1 .ci/run` calls this at its end.

usage: python tests/trust/ci_record.py JUNIT SECONDS, the seconds being those of all of CI with its installation.
"""

import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from trust_record import TrustRecord, write_record

COMMAND = "DEEPLABZOO_RECORD=1 .ci/run"
_MAX_LISTED = 10
"""Files of tests that take longest."""


def record(junit: Path, seconds: float) -> TrustRecord:
    """Return the record: how many tests, their time, and where it goes. The file is one that our own pytest wrote."""
    suite = ET.parse(junit).getroot()[0]
    cases = suite.findall("testcase")
    skipped = sum(case.find("skipped") is not None for case in cases)
    spent: dict[str, float] = defaultdict(float)
    for case in cases:
        spent[_file(case.get("classname", ""))] += float(case.get("time", 0))
    longest = {name: round(spent[name], 1) for name in sorted(spent, key=lambda name: -spent[name])}
    return TrustRecord(
        name="ci",
        area="tests",
        what=f"All that CI does on every change: installation, {len(cases) - skipped:,} tests, style, types, the site.",
        command=COMMAND,
        seconds=round(seconds, 1),
        details={
            "tests_passed": len(cases) - skipped,
            "tests_skipped": skipped,
            "wall_seconds_of_tests": round(float(suite.get("time", 0)), 1),
            "seconds_of_the_longest_files": dict(list(longest.items())[:_MAX_LISTED]),
            "seconds_of_files_of_trust": {name: took for name, took in longest.items() if name.startswith("trust/")},
        },
    )


def _file(classname: str) -> str:
    """Return the file of a test: `tests.trust.test_verify` is `trust/test_verify.py`."""
    parts = classname.split(".")
    last = next((place for place, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
    return "/".join(parts[1 : last + 1]) + ".py"


if __name__ == "__main__":
    write_record(record(Path(sys.argv[1]), float(sys.argv[2])))
