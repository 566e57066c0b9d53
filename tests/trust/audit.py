"""Known vulnerabilities of the light install: `python tests/trust/audit.py` asks OSV about every distribution, with pip-audit.

It needs the network (api.osv.dev) and says so in one sentence where that cannot be reached: then nothing is known, and the
status is 2. Status 1: something is known, listed with the version that mends it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dependencies import light_install

SERVICE = "https://api.osv.dev/v1/query"


def audit(pins: Sequence[str], service: str) -> tuple[int, list[str]]:
    """Return the status and what is to be said of these `name==version`."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "requirements.txt"
        asked.write_text("\n".join(pins) + "\n")
        words = ["--strict", "--disable-pip", "--no-deps", "--progress-spinner=off", "--cache-dir", folder, "--format=json"]
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *words, "--vulnerability-service=osv", "--osv-url", service, "-r", str(asked)],
            capture_output=True,
            text=True,
            check=False,
        )
    if "No module named pip_audit" in done.stderr:
        return 2, ['The audit needs pip-audit; install it with `pip install -e ".[release]"`.']
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return 2, [f"{service} did not answer, so nothing is known of {len(pins)} distributions: {reason}"]
    found = list(_vulnerabilities(answers))
    return (1, found) if found else (0, [f"{len(answers)} distributions, no known vulnerability"])


def _vulnerabilities(answers: Sequence[dict[str, Any]]) -> Iterator[str]:
    for one in answers:
        for known in one["vulns"]:
            mended = ", ".join(known["fix_versions"]) or "no version yet"
            yield f"{one['name']} {one['version']}: {known['id']}, mended in {mended}: {known.get('description', '')[:120]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is known and return the status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service", default=SERVICE, help=f"default: {SERVICE}")
    status, lines = audit([f"{one.name}=={one.version}" for one in light_install().values()], parser.parse_args(argv).service)
    print(*lines, sep="\n", file=sys.stderr if status == 2 else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
