"""Print the README's set-up command whose fenced block is marked `<!-- command: NAME -->`, so that CI runs what users read."""

import re
import sys
from pathlib import Path


def command(readme: str, name: str) -> str:
    """Return the one command line of the block marked `name`; raises SystemExit where there is not exactly one."""
    blocks = re.findall(rf"<!-- command: {re.escape(name)} -->\s*```(?:bash|sh)\n(.*?)```", readme, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    if len(lines) != 1:
        raise SystemExit(f"README.md must hold exactly one line marked 'command: {name}', it holds {len(lines)}.")
    return lines[0]


if __name__ == "__main__":
    print(command((Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8"), sys.argv[1]))
