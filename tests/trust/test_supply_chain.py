"""What a release is made of, for whoever does not take our word: parts, licences, known flaws, and the same wheel twice."""

import importlib.metadata
import importlib.util
import json
import re
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import audit
import dependencies
import licences_page
import pytest
import sbom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from deeplabzoo.hub.manifest import BundledSource, released

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")


def test_a_bill_of_materials_names_everything_that_is_installed(wheel: Path) -> None:
    """Valid CycloneDX: the wheel with its hash, all distributions with versions, the bundled weights with hash and licence."""
    text = sbom.bill_of_materials(wheel)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    parts = {part["bom-ref"]: part for part in document["components"]}
    installed = dependencies.light_install()
    assert {f"{name}=={importlib.metadata.version(name)}" for name in installed} <= parts.keys()
    assert {"torch", "timm", "filelock", "typing-extensions"} <= installed.keys()
    bundled = [row for row in released() if isinstance(row.source, BundledSource)]
    for row in bundled:
        assert parts[f"weights:{row.full_name}"]["hashes"][0]["content"] == row.sha256
        assert parts[f"weights:{row.full_name}"]["type"] == "machine-learning-model"
    assert len(parts) == len(installed) + len(bundled)
    needed = {one["ref"]: one.get("dependsOn", []) for one in document["dependencies"]}
    assert {name.split("==")[0] for name in needed["wheel"]} >= set(dependencies.direct())
    assert sbom.bill_of_materials(wheel) == text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel as small as one can be: what stands in the document is read from it."""
    path = tmp_path_factory.mktemp("dist") / "deeplabzoo-9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        metadata = "Metadata-Version: 2.4\nName: deeplabzoo\nVersion: 9.9\nSummary: a test\nLicense-Expression: Apache-2.0\n"
        archive.writestr("deeplabzoo-9.9.dist-info/METADATA", metadata)
    return path


def test_the_licences_of_all_weights_are_listed() -> None:
    """The table in docs/licences.md is what the manifest says, for every released file."""
    begin, end = f"<!-- {licences_page.WEIGHTS}:begin -->\n", f"\n<!-- {licences_page.WEIGHTS}:end -->"
    assert PAGE.split(begin)[1].split(end)[0] == licences_page.weights_block(released())
    assert all(row.license.data and row.license.weights and row.license.code for row in released())


def test_the_licences_of_all_dependencies_are_listed() -> None:
    """What pyproject.toml asks for stands in docs/licences.md; the licence of a version that is installed here is the same."""
    table = PAGE.split(f"<!-- {licences_page.DEPENDENCIES}:begin -->")[1].split(f"<!-- {licences_page.DEPENDENCIES}:end -->")[0]
    listed = dict(re.findall(r"^\| \**([a-z0-9-]+)\** \| (.+? \| .+?) \|", table, flags=re.MULTILINE))
    asked = set(dependencies.direct()) | {name for names in dependencies.extras().values() for name in names}
    assert asked <= listed.keys()
    for name in asked:
        try:
            found = dependencies.described(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        version, licence = listed[name].split(" | ")
        if version == found.version:
            assert licence == found.licence


def test_the_light_install_is_light() -> None:
    """torch, timm, safetensors, huggingface_hub, numpy, pillow and two small ones; nothing to compile (asks.md theme P)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {Requirement(line).name for line in project["dependencies"]}
    assert names == {"torch", "timm", "huggingface-hub", "safetensors", "numpy", "pillow", "filelock", "tqdm"}


def test_actions_of_workflows_are_pinned_to_commits() -> None:
    """A tag or branch of another repository can be moved, a commit cannot; `./` is a file of the same commit."""
    files = [*ROOT.glob(".github/workflows/*.y*ml"), *ROOT.glob(".github/actions/*/action.y*ml")]
    used = [one for file in files for one in re.findall(r"uses:\s*(\S+)", file.read_text(encoding="utf-8"))]
    assert len(used) > 10
    assert [one for one in used if not re.search(r"@[0-9a-f]{40}$|^\./", one)] == []
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert not re.search(r"\b(curl|wget|sudo)\b|\| *(ba)?sh\b", script)


VULNERABLE = {
    "vulns": [
        {
            "id": "PYSEC-2099-1",
            "summary": "a made one",
            "affected": [
                {
                    "package": {"name": "pillow", "ecosystem": "PyPI"},
                    "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}],
                }
            ],
        }
    ]
}


@contextmanager
def vulnerability_service() -> Iterator[str]:
    """A service that knows one vulnerability, of pillow."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(VULNERABLE if question["package"]["name"] == "pillow" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("pip_audit"), reason='pip-audit comes with pip install -e ".[release]"')
def test_the_audit_tells_known_unknown_and_unreachable_apart() -> None:
    """A service that does not answer is no clean bill: pip-audit alone passes where the index has no such page."""
    with vulnerability_service() as service:
        assert audit.audit(["numpy==2.0.0", "tqdm==4.67.0"], service) == (0, ["2 distributions, no known vulnerability"])
        status, lines = audit.audit(["numpy==2.0.0", "pillow==10.3.0"], service)
        assert status == 1
        assert lines == ["pillow 10.3.0: PYSEC-2099-1, mended in 99.1: a made one"]
    status, (sentence,) = audit.audit(["numpy==2.0.0"], service)  # now it is gone
    assert status == 2
    assert "did not answer, so nothing is known of 1 distributions" in sentence
