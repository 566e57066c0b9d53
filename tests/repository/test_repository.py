"""The files around the package agree with it: workflows, forms, citation and targets name versions and commands that exist."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import deeplabzoo

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = dict(re.findall(r"^([a-z]+):.*?##\s+(.+)$", MAKEFILE, flags=re.MULTILINE))
"""Target of the Makefile -> its line of help."""
YAML_FILES = sorted([*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; `on`, a boolean in YAML 1.1, is the key True."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the steps of all jobs of a workflow, or of a composite action."""
    content = read_yaml(path)
    jobs = content["jobs"].values() if "jobs" in content else [content["runs"]]
    for job in jobs:
        yield from job.get("steps", [])


STEPS = [step for path in (*WORKFLOWS, *GITHUB.glob("actions/*/action.yml")) for step in steps_of(path)]
SCRIPTS = [step["run"] for step in STEPS if "run" in step]


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


# --- Python and libraries: one place each


def oldest_python() -> str:
    """The lower bound of requires-python."""
    return re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])[1]  # type: ignore[index]


def classified_pythons() -> list[str]:
    """The versions of Python that the classifiers name, oldest first."""
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", one) for one in PROJECT["classifiers"])
    return sorted((match[1] for match in found if match), key=as_numbers)


def test_classifiers_name_every_python_from_the_oldest_on() -> None:
    """PyPI shows what requires-python allows, without a gap."""
    first, last = as_numbers(oldest_python()), as_numbers(classified_pythons()[-1])
    assert classified_pythons() == [f"3.{minor}" for minor in range(first[1], last[1] + 1)]


def test_tools_and_readme_name_the_oldest_python() -> None:
    """A linter or type checker of a newer Python would accept what the oldest cannot run."""
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest_python().replace(".", "")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest_python()
    assert f"Needs Python {oldest_python()} or newer" in README


def test_the_suite_runs_on_three_systems_at_both_ends() -> None:
    """Linux, macOS and Windows; the oldest libraries with the oldest Python, the newest with the newest."""
    matrix = read_yaml(GITHUB / "workflows" / "tests.yml")["jobs"]["suite"]["strategy"]["matrix"]
    assert [system.partition("-")[0] for system in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert matrix["libraries"] == ["oldest", "newest"]
    pythons = {entry["libraries"]: entry["python"] for entry in matrix["include"]}
    assert pythons == {"oldest": oldest_python(), "newest": classified_pythons()[-1]}


def test_all_other_jobs_run_on_the_newest_python() -> None:
    """A version that is written in a step is the newest; the oldest is the matrix's."""
    inputs = [step["with"] for step in STEPS if "with" in step]
    named = [one[key] for one in inputs for key in ("python", "python-version") if key in one]
    written = {version for version in named if "${{" not in version}
    assert written == {classified_pythons()[-1]}
    assert all(isinstance(version, str) for version in named)  # 3.10 without quotes would be 3.1


def test_the_oldest_libraries_are_the_bounds_of_pyproject() -> None:
    """The workflow asks tests/trust/oldest.py, which knows every dependency's lower bound; no version is written twice."""
    (script,) = [script for script in SCRIPTS if "oldest.py" in script]
    assert 'if [ "$LIBRARIES" = oldest ]; then python tests/trust/oldest.py' in script
    command = [sys.executable, "tests/trust/oldest.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    bounds = {line.replace(">=", "==") for line in PROJECT["dependencies"]}
    assert {line for line in printed if not line.startswith("torchvision==")} == bounds
    assert len(printed) == len(bounds) + 1  # torchvision, of the same release as torch
    assert [script for script in SCRIPTS if re.search(r"(torch|timm|huggingface-hub|numpy)[=<>~]=", script)] == []


def test_extras_of_workflows_and_contributing_exist() -> None:
    extras = set(PROJECT["optional-dependencies"])
    named = [step["with"]["extras"] for step in STEPS if "extras" in step.get("with", {})]
    named += re.findall(r'-e "\.\[([a-z,]+)\]"', "\n".join([*SCRIPTS, CONTRIBUTING, MAKEFILE]))
    assert len(named) > 6
    assert {extra for names in named for extra in names.split(",")} <= extras


# --- commands and files


def make_targets_in(text: str) -> set[str]:
    """The words after `make` where it stands as a command: at the beginning of a line of code, or in backticks."""
    lines = re.findall(r"(?:^|`)make((?: [a-z]+)+)(?=`|\s*(?:#|$))", text, flags=re.MULTILINE)
    return {word for line in lines for word in line.split()}


def test_every_make_target_that_is_named_exists() -> None:
    """In CONTRIBUTING, SECURITY, the README, the docs, the workflows and the markers of pytest."""
    documents = [CONTRIBUTING, README, (ROOT / "SECURITY.md").read_text(encoding="utf-8"), str(PYPROJECT["tool"]["pytest"])]
    documents += [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    named = set().union(*map(make_targets_in, [*documents, *SCRIPTS]))
    assert named >= {"test", "quality", "style", "docs", "soak", "sbom"}
    assert named <= TARGETS.keys()


def test_every_make_target_is_phony_and_explained() -> None:
    """`make` lists all of them; none is taken for a file, such as the folder docs."""
    rules = re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, flags=re.MULTILINE)[1].split()  # type: ignore[index]
    assert rules == list(TARGETS) == phony
    assert rules[0] == "help"


@pytest.mark.posix
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_lists_the_targets() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[1]: line.split(maxsplit=2)[2] for line in done.stdout.splitlines()} == TARGETS


def readme_command(name: str) -> str:
    command = [sys.executable, ".ci/readme_command.py", name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_the_tests_run_as_the_readme_says() -> None:
    """`make test`, the workflow and the README start them with the same command."""
    install, _, test = readme_command("tests").partition(" && ")
    assert install == 'pip install -e ".[test]"'
    assert f"\t{test.replace('python', '$(PYTHON)', 1)}\n" in MAKEFILE
    runs = [script.removeprefix(test) for script in SCRIPTS if script.startswith(test)]
    assert sorted(runs) == [" --ignore tests/trust", " tests/trust"]


def test_the_readmes_first_command_is_run_from_the_wheel_and_from_the_checkout() -> None:
    """With and without its installation of the checkout, whose form the workflow relies on."""
    assert readme_command("predict").startswith("pip install . && python -m deeplabzoo.predict ")
    asked = [line for script in SCRIPTS for line in script.splitlines() if ".ci/readme_command.py predict" in line]
    assert len(asked) == 2
    assert any('"${command#pip install . && }"' in script for script in SCRIPTS)


def test_files_that_workflows_name_exist() -> None:
    """Scripts that are run, local actions and workflows, and the paths of caches and dependabot."""
    named = re.findall(r"\bpython ((?:tests|\.ci|docs|tools)/[\w/.]+\.py)", "\n".join(SCRIPTS))
    uses = [step["uses"] for step in STEPS if "uses" in step]
    uses += [job["uses"] for path in WORKFLOWS for job in read_yaml(path)["jobs"].values() if "uses" in job]
    named += [one.removeprefix("./") for one in uses if one.startswith("./")]
    named += [step["with"]["cache-dependency-path"] for step in STEPS if "cache-dependency-path" in step.get("with", {})]
    for update in read_yaml(GITHUB / "dependabot.yml")["updates"]:
        named += [one.removeprefix("/") for one in update.get("directories", [update.get("directory")])]
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_hooks_before_a_commit_are_the_tools_of_make_quality() -> None:
    """A commit that passes here passes there."""
    (local,) = [repo for repo in read_yaml(ROOT / ".pre-commit-config.yaml")["repos"] if repo["repo"] == "local"]
    hooks = [hook["entry"].replace(" --fix", "").replace(" --force-exclude", "") for hook in local["hooks"]]
    recipe = MAKEFILE.split("\nquality:")[1].split("\n\n")[0]
    quality = [line.replace(" --check", "").removesuffix(" .") for line in re.findall(r"\$\(PYTHON\) -m (.+)", recipe)]
    assert hooks == quality == ["ruff check", "ruff format", "mypy"]


# --- the files are what GitHub and others read


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_is_yaml(path: Path) -> None:
    """Without tabs, and with something in it."""
    assert isinstance(read_yaml(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_ask_for_little_and_end(path: Path) -> None:
    """Permissions are stated and read-only by default, an older run of the same branch is known, and no job hangs for hours."""
    workflow = read_yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    assert "pull_request_target" not in workflow[True]
    for name, job in workflow["jobs"].items():
        assert "uses" in job or 0 < job["timeout-minutes"] <= 60, name
        written = {key for key, value in job.get("permissions", {}).items() if value == "write"}
        assert written == {"publish": {"id-token"}, "github": {"contents"}}.get(name, set()), name


def test_each_action_has_one_commit_and_names_its_version() -> None:
    """The comment is what a person reads, and what dependabot raises together with the commit."""
    files = "\n".join(path.read_text(encoding="utf-8") for path in YAML_FILES)
    uses = re.findall(r"uses: (?!\./)(.+)", files)
    assert len(uses) > 10
    assert [one for one in uses if not re.fullmatch(r"(actions|pypa)/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one)] == []
    assert len(set(uses)) == len({one.partition("@")[0] for one in uses})
    checkouts = [step for step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_a_release_is_tested_built_and_published_in_this_order() -> None:
    """Each job waits for the one before it; PyPI is reached from the environment that a person can guard."""
    workflow = read_yaml(GITHUB / "workflows" / "release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    jobs = workflow["jobs"]
    order = ["version", "tests", "build", "publish", "github"]
    assert list(jobs) == order
    assert [jobs[name].get("needs") for name in order] == [None, *order[:-1]]
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert "workflow_call" in read_yaml(GITHUB / "workflows" / "tests.yml")[True]
    assert jobs["publish"]["environment"]["name"] == "pypi"


@pytest.mark.posix
@pytest.mark.parametrize(
    ("tag", "heading", "complaint"),
    [
        ("v{version}", "## {version} (2026-12-24)", ""),
        ("v{version}", "## {version} (unreleased)", "The changelog has no heading"),
        ("v{version}.1", "## {version} (2026-12-24)", "but the package's version is {version}"),
        ("{version}", "## {version} (2026-12-24)", "but the package's version is {version}"),
    ],
)
def test_a_tag_is_released_only_where_it_is_the_version(tag: str, heading: str, complaint: str, tmp_path: Path) -> None:
    """The step of the workflow itself, run on a copy of the package and a changelog of one line."""
    version = deeplabzoo.__version__
    (script,) = [script for script in SCRIPTS if "GITHUB_REF_NAME" in script]
    (tmp_path / "deeplabzoo").mkdir()
    for module in ("__init__.py", "moved.py"):
        shutil.copy(ROOT / "deeplabzoo" / module, tmp_path / "deeplabzoo")
    (tmp_path / "CHANGELOG.md").write_text(f"# Changes\n\n{heading.format(version=version)}\n", encoding="utf-8")
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", f'python() {{ "{sys.executable}" -E "$@"; }}\n{script}'],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "GITHUB_REF_NAME": tag.format(version=version)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert (done.returncode == 0) is (complaint == "")
    assert complaint.format(version=version) in done.stdout


def test_the_changelog_begins_with_the_version() -> None:
    """In the form that the release workflow looks for, or still open."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## (\S+) \((.+)\)$", changelog, flags=re.MULTILINE).groups()  # type: ignore[union-attr]
    assert version == deeplabzoo.__version__
    assert date == "unreleased" or re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)


def test_the_citation_is_of_this_package_and_its_papers() -> None:
    """Version and licence are the package's; both architectures are cited by their arXiv numbers."""
    citation = read_yaml(ROOT / "CITATION.cff")
    assert str(citation["version"]) == deeplabzoo.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    papers = [one["value"] for paper in citation["references"] for one in paper["identifiers"]]
    assert papers == ["arXiv:1706.05587", "arXiv:1802.02611"]


def test_one_address_is_the_repositorys() -> None:
    """Package, citation and issue forms send people to the same place, and to files that are in it."""
    home = PROJECT["urls"]["Homepage"]
    assert read_yaml(ROOT / "CITATION.cff")["repository-code"] == home
    links = [link["url"] for link in read_yaml(GITHUB / "ISSUE_TEMPLATE" / "config.yml")["contact_links"]]
    links += PROJECT["urls"].values()
    assert [link for link in links if not f"{link}/".startswith(f"{home}/")] == []
    paths = [match[1] for link in links if (match := re.search(r"/(?:blob|tree)/main/(.+)", link))]
    assert len(paths) >= 3
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_forms(path: Path) -> None:
    """GitHub shows no form that lacks a name, a description, or fields with labels and ids of their own."""
    form = read_yaml(path)
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) > 2
    assert {field["type"] for field in form["body"]} <= {"input", "textarea", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_a_pull_request_answers_three_questions() -> None:
    """Those of CONTRIBUTING, in its words and order."""
    asked = re.findall(r"^\*\*(.+)\*\*$", (GITHUB / "pull_request_template.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert (
        asked == re.findall(r"^\d\. \*(.+?)\*", CONTRIBUTING.split("## Before you submit a change")[1], flags=re.MULTILINE)[:3]
    )
    assert len(asked) == 3


def test_no_test_compares_a_stopwatch_with_a_constant() -> None:
    """A busy machine makes such a test fail; speed is counted here and measured in benchmarks/. Deadlines use monotonic()."""
    clocks = re.compile(r"\b(perf_counter|process_time|thread_time)(_ns)?\(")
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) and clocks.search(ast.unparse(node.test))
    ]
    assert found == []
