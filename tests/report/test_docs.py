import re
from pathlib import Path

import pytest
from run_maker import make_run

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


def test_examples_of_the_statistics_page_run(capsys):
    for block in blocks("statistics.md"):
        exec(block, {})
    assert capsys.readouterr().out.startswith("0.90 [")


def test_examples_of_the_reports_page_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for case in ("cal_ql", "cql"):
        for seed in (0, 1):
            make_run(tmp_path / "runs" / "cal_ql", case, seed)
    monkeypatch.chdir(tmp_path)
    for block in blocks("reports.md"):
        exec(block, {})
    assert (tmp_path / "runs" / "cal_ql" / "report.html").is_file()
