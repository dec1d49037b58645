"""docs/results.md says what the published files of results say, to the digit."""

import json
from pathlib import Path

import pytest
from genomics import table as table_of_classes

from pytitans.evals.report import write_report
from pytitans.forecasting.backtest import table
from pytitans.genomics.genome import genome_table

ROOT = Path(__file__).parent.parent
ASKED = ("ablation", "babilong", "language", "needle", "released", "states")  # by titans eval
CLASSES = sorted(
    path for path in (ROOT / "results" / "genomics").glob("*.json") if path.stem != "ecoli"
)
FORECAST = sorted((ROOT / "results" / "forecasting").glob("*.json"))


def assert_printed(text: str) -> None:
    """Every row of the text's tables stands in docs/results.md."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    printed = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert rows
    assert [row for row in rows if row not in printed] == []


@pytest.mark.parametrize("name", ASKED)
def test_its_tables_are_those_of_titans_report(name, tmp_path):
    files = sorted((ROOT / "results" / name).glob("*.json"))
    files = [path for path in files if path.stem != "sweep"]
    assert_printed(write_report(files, tmp_path)[0].read_text())


@pytest.mark.parametrize("path", FORECAST, ids=lambda path: path.stem)
def test_a_series_table_is_that_of_its_scores(path):
    cells = json.loads(path.read_text())["cells"]
    assert_printed(table([cell for cell in cells if cell["split"] == "test"]))


@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.stem)
def test_a_table_of_classes_is_that_of_its_scores(path):
    assert_printed(table_of_classes(json.loads(path.read_text())["rows"]))


def test_the_genome_table_is_that_of_its_scores():
    assert_printed(genome_table(json.loads((ROOT / "results/genomics/ecoli.json").read_text())))


def test_every_folder_of_results_is_checked():
    folders = {path.name for path in (ROOT / "results").glob("*") if path.is_dir()}
    assert folders == {*ASKED, "forecasting", "genomics"}
    assert FORECAST and CLASSES
