"""docs/results.md says what the published files of results say, to the digit."""

from pathlib import Path

import pytest

from pytitans.evals.report import write_report

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path for path in (ROOT / "results").glob("*") if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_its_tables_are_those_of_titans_report(folder, tmp_path):
    files = sorted(path for path in folder.glob("*.json") if path.stem != "sweep")
    report = write_report(files, tmp_path)[0].read_text()
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    printed = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert rows
    assert [row for row in rows if row not in printed] == []


def test_results_are_published():
    assert FOLDERS
