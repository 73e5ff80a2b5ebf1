"""Documentation that works: code blocks run, links and named tests exist.

Convention: the ```python blocks of a page run in order, in one namespace and an empty directory. A block that shows
something which cannot run by itself has `<!-- no-test -->` on the line before it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ("docs/results/", "docs/images/")  # made by runs; checked by whoever commits them
BLOCK = re.compile(r"(<!-- no-test -->\s*\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ELSEWHERE = {"docs/reports.md"}  # needs runs to report on: tests/report/test_docs.py


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    return [code for skipped, code in BLOCK.findall(page.read_text()) if not skipped]


def _params() -> list:
    made = []
    for page in PAGES:
        name = name_of(page)
        if name.startswith("docs/objectives/") or name in ELSEWHERE or not blocks(page):
            continue  # objectives: tests/objectives/conformance.py, with fewer updates
        made.append(pytest.param(page, id=name))
    return made


@pytest.mark.parametrize("page", _params())
def test_code_of_the_page_runs(page, tmp_path):
    (tmp_path / "page.py").write_text("\n\n".join(blocks(page)))
    path = os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    work = subprocess.run(
        [sys.executable, "page.py"], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert work.returncode == 0, work.stderr


def test_the_example_runs_without_simulators(tmp_path):
    """Cut down; and what it leaves can be evaluated by the command."""
    code = (
        "import sys\n"
        "for name in ('mujoco', 'gymnasium_robotics', 'matplotlib', 'minari'): sys.modules[name] = None\n"
        "import bring_your_own\n"
        "bring_your_own.main('out', 20, 20)\n"
        "from steelyard.cli.main import main\n"
        "sys.exit(main(['data', 'check', 'out/data']) or main(['eval', 'out/run', '--episodes', '2']))\n"
    )
    path = os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    work = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert work.returncode == 0, work.stderr
    assert "the loaded policy does" in work.stdout
    assert "95% interval" in work.stdout
    assert len((ROOT / "examples/bring_your_own.py").read_text().splitlines()) < 80


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)[^)]*\)", text)
    named = re.findall(r"`((?:tests|examples|benchmarks|docs|src/steelyard)/[\w/.-]+\.(?:py|md|json))", text)
    wanted = [(page.parent / link).resolve() for link in links] + [ROOT / name for name in named]
    missing = [path.relative_to(ROOT).as_posix() for path in wanted if not path.exists() and "NAME" not in path.name]
    assert [name for name in missing if not name.startswith(GENERATED)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    """Every `steelyard COMMAND` on a page is one, and every command of the program has its line in the reference."""
    from steelyard.cli.main import COMMANDS

    for command in re.findall(r"(?:^|`|&& |\n)steelyard ([a-z_]+)", page.read_text()):
        assert command in COMMANDS, command
    if page.name == "command_line.md":
        for name in COMMANDS:
            assert f"\n## `steelyard {name}" in page.read_text()
