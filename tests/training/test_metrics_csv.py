"""metrics.csv when somebody or something else has been at it."""

from pathlib import Path
from typing import Any

import pytest

from ldm.training.lightning_fixes.metrics_csv import MetricsCsv


def written(path: Path, rows: int) -> MetricsCsv:
    logger = MetricsCsv(path)
    for step in range(1, rows + 1):
        logger.log_metrics({"epoch": 0, "loss": step / 10}, step)
    return logger


def resumed(path: Path, rows: int, step: int) -> list[str]:
    logger = MetricsCsv(path)
    logger.go_on_after(rows)
    logger.log_metrics({"epoch": 1, "loss": 0.5}, step)
    logger.log_metrics({"epoch": 1, "loss": 0.5}, step + 1)
    lines = path.read_text().splitlines()
    assert logger.flush() == len(lines) - 1
    return lines


def test_a_resumed_file_goes_on_after_the_rows_of_the_checkpoint(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "metrics.csv"
    written(path, 8)
    assert resumed(path, 6, 7)[-3:] == ["6,0,0.6", "7,1,0.5", "8,1,0.5"]
    assert not caplog.text


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda path: path.unlink(), 0),
        (lambda path: path.write_bytes(b""), 0),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), 2),
        (lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:4])), 3),
        (lambda path: path.write_text(path.read_text() + "7"), 6),
    ],
)
def test_missing_rows_are_told_and_torn_ones_dropped(damage: Any, left: int, tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "metrics.csv"
    written(path, 6)
    damage(path)
    lines = resumed(path, 6, 7)
    assert len(lines) == 1 + left + 2 and lines[-1] == "8,1,0.5"
    assert left == 6 or (f"{6 - left} of its 6 rows are missing" in caplog.text and str(path) in caplog.text)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00step", b"a,b\n1,2\n", b"step,epoch\n\x00,1\n" + b"\x81"])
def test_what_is_no_table_of_ours_is_put_aside(content: bytes, tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    assert len(resumed(path, 4, 5)) == 3
    assert path.with_name("metrics.damaged.csv").read_bytes() == content and "metrics.damaged.csv" in caplog.text
    path.write_bytes(b"\xff" + content)
    resumed(path, 4, 5)
    kept = [path.with_name(f"metrics.damaged{number}.csv").read_bytes() for number in ("", 1)]
    assert kept == [content, b"\xff" + content]


def test_a_file_that_is_removed_meanwhile_begins_anew(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "metrics.csv"
    logger = written(path, 3)
    path.unlink()
    logger.log_metrics({"epoch": 0, "loss": 0.4}, 4)
    assert path.read_text().splitlines() == ["step,epoch,loss", "4,0,0.4"] and logger.flush() == 1
    assert "removed with its 3 rows" in caplog.text
