"""Time and price follow from what a step costs by the stated assumptions; what does not fit is a problem."""

from __future__ import annotations

from pathlib import Path

import pytest
from breakage.processes import write_config

from ldm.cli import doctor
from ldm.cli.arguments import parse
from ldm.cli.train import plan_of
from ldm.doctor.plan import Assumptions, Duration, time_lines
from ldm.errors import UserError
from ldm.training.cards import CARDS, Card


def test_lines_of_a_duration() -> None:
    duration = Duration(seconds=0.5, samples=64, cards=8, steps=72_000)  # ten hours
    step, whole, price = duration.lines(price=2.5)
    assert step == "a step of 64 samples: 0.5 s, 128 samples/s"
    assert whole == "72,000 steps: 10 h on 8, 80 hours of a card"
    assert price == "price: 200.00, at 2.5 for an hour of a card"
    assert "--max_steps" in Duration(0.5, 64, 8, None).lines(2.5)[-1]


def test_cards_by_name_and_by_memory() -> None:
    assert Card.of("h100") is CARDS["H100"] and Card.of("12.5").memory == 12.5
    peaks = [
        CARDS["A100"].peak(*how)
        for how in (("bf16-mixed",), ("16-true",), ("32", "high"), ("32-true",), ("32", "highest"))
    ]
    assert peaks == [312, 312, 156, 19.5, 19.5] and Card.of("80").peak("32") is None
    for text in ("H1000", "0", "-3", "nan", "inf"):
        with pytest.raises(UserError, match=f"--card {text}: .* 80, or one of .*H100"):
            Card.of(text)
    for wrong in ((0.0,), (1.5,), (0.2, -1.0), (0.2, None, float("nan"))):
        with pytest.raises(UserError, match="--mfu|--tflops|--price"):
            Assumptions(*wrong)


def lines(config: Path, card: str, assumed: Assumptions, *words: str) -> dict[str, str]:
    """Return the lines on a training of 10^9 FLOPs a step of a device, by what stands before their colon."""
    plan = plan_of(parse(["--base", str(config), "--dry-run", "--accelerator", "gpu", "--gpus", "4", *words]))
    return dict(line.split(": ", 1) for line in time_lines(plan, 10**9, Card.of(card), assumed))


def test_time_is_work_by_peak_and_share(tmp_path: Path) -> None:
    config, accumulate = write_config(tmp_path), "lightning.trainer.accumulate_grad_batches=3"
    found = lines(config, "16", Assumptions(0.5, 0.001, 3.0), accumulate, "--max_steps", "1200")
    assert found["assumed"].startswith("50% of 0.001 TFLOP/s (32)")
    assert found["a step of 24 samples"] == "6 s, 4 samples/s"  # 2 a device, 4 devices, 3 accumulated
    assert found["1,200 steps"] == "2 h on 4, 8 hours of a card" and found["price"].startswith("24.00, ")
    assert "give --tflops" in lines(config, "16", Assumptions(0.5))["not known"]
    found = lines(config, "H100", Assumptions(0.2), "--precision", "bf16-mixed")
    assert found["assumed"].startswith("20% of 989 TFLOP/s (bf16-mixed)")


def test_a_report_with_its_page_and_a_batch_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, page = str(write_config(tmp_path)), tmp_path / "plan.html"
    words = ["plan", "--base", config, "--card", "1.05", "--tflops", "1", "--html", str(page)]
    with pytest.raises(SystemExit):
        doctor.main([*words, "data.params.batch_size=5000"])
    printed = capsys.readouterr()
    assert "5000 samples do not fit on a card of 1.05 GiB; set data.params.batch_size=" in printed.err
    for said in (
        "GiB at the peak of a step of 5000",
        "checkpoint: ",
        "largest batch on a card of 1.05",
        "assumed: 20% of 1 ",
    ):
        assert said in printed.out and said in page.read_text(), said
