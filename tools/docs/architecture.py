"""`python -m tools.docs.architecture`: the module tree of docs/architecture.md, from the first line of every docstring."""

import ast
import sys
from pathlib import Path

from deeplabzoo.files import write_atomically
from tools.docs.tables import replace_block

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "deeplabzoo"
PAGE = ROOT / "docs" / "architecture.md"
BLOCK = "module-tree"
FOLDERS = (
    "models",
    "data",
    "checkpoints",
    "hub",
    "processing",
    "optimization",
    "inference",
    "evaluation",
    "export",
    "training",
)
"""Order of the page: that of the layers; what stands above comes behind."""


def module_tree() -> str:
    """Return the tree as a fenced block: a line for each folder and module with what its docstring says first."""
    lines = ["```", "deeplabzoo/"]
    own = [path for path in sorted(PACKAGE.glob("*.py")) if not path.name.startswith("__") and not _is_launcher(path)]
    lines += [f"  {path.name:<{_WIDTH - 2}} {_first_line(path)}" for path in own]
    others = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file() and path.name not in FOLDERS)
    for name in (*FOLDERS, *others):
        lines += _folder(PACKAGE / name, 2)
    return "\n".join([*lines, "```"])


_WIDTH = 32
"""Columns of the names."""


def _folder(folder: Path, indent: int) -> list[str]:
    space = " " * indent
    lines = [f"{space}{folder.name + '/':<{_WIDTH - indent}} {_first_line(folder / '__init__.py')}"]
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and not path.name.startswith("__"):
            lines.append(f"{space}  {path.name:<{_WIDTH - indent - 2}} {_first_line(path)}")
        elif (path / "__init__.py").is_file():
            lines += _folder(path, indent + 2)
    return lines


def _is_launcher(path: Path) -> bool:
    return _first_line(path).startswith("`python -m deeplabzoo.")


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.rstrip(".")


def main() -> int:
    """Write the tree into the page."""
    text = replace_block(PAGE, module_tree(), BLOCK).encode()
    write_atomically(PAGE, lambda file: file.write(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
