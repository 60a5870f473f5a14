"""What is shown of run folders, also of those that are being written or broken."""

import json
import os
import shutil

import pytest

from ldm.errors import UserError
from ldm.serve.runs import Runs, RunView, difference, find_runs


def test_runs_are_found_newest_first_and_broken_ones_are_told(logs):
    runs = find_runs([logs])
    assert [run.name for run in runs] == ["3-text", "2-class", "1-none", "0-broken"]
    assert [bool(run.problem()) for run in runs] == [False, False, False, True]
    assert [run.name for run in find_runs([logs / "2-class", logs])] == ["2-class", "3-text", "1-none", "0-broken"]
    for wrong in (logs / "absent", logs / "0-broken"):
        with pytest.raises(UserError, match=wrong.name):
            find_runs([wrong])


def test_curves_leave_out_what_is_no_number_or_not_written_yet(logs):
    curves = RunView(logs / "2-class").curves()
    assert curves == {"train/loss": [(1.0, 2.5), (2.0, 0.25), (4.0, 0.12)], "val/loss": [(2.0, 0.5)]}
    assert RunView(logs / "0-broken").curves() == {}


def test_long_curves_are_thinned_out_by_means(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,x\n" + "\n".join(f"{i},{i % 2}" for i in range(10_000)))
    (points,) = RunView(tmp_path).curves().values()
    assert len(points) == 2000 and points[-1][0] == 9999
    assert sum(value for _, value in points) / len(points) == pytest.approx(0.5, abs=0.1)


def test_images_by_kind_and_step(logs, tmp_path):
    run = RunView(logs / "1-none")
    ((kind, entries),) = run.images().items()
    assert kind == "val/samples" and [step for step, _ in entries] == [5, 10]
    assert run.image(entries[0][1]).startswith(b"\x89PNG")
    shutil.copytree(logs / "1-none", tmp_path / "run")
    written = tmp_path / "run" / entries[0][1]
    written.write_bytes(written.read_bytes()[:-5])
    with pytest.raises(UserError, match="is being written"):
        RunView(tmp_path / "run").image(entries[0][1])
    for wrong in ("images/val/secret.png", "../1-none/" + entries[0][1], "configs/config.yaml", "/etc/passwd"):
        with pytest.raises(UserError, match="is no image"):
            run.image(wrong)


def test_configs_and_their_difference(logs):
    none, classes = RunView(logs / "1-none"), RunView(logs / "2-class")
    assert "ldm.networks.unet.UNet" in none.config()
    lines = difference(none, classes)
    assert any(line.startswith("+") and "ClassConditioner" in line for line in lines)
    assert difference(none, none) == []
    with pytest.raises(UserError, match="no config"):
        RunView(logs / "0-broken").config()


def test_runs_that_begin_or_go_meanwhile_keep_the_numbers_of_the_others(logs, tmp_path):
    for name in ("1-none", "2-class"):
        shutil.copytree(logs / name, tmp_path / name)
    runs = Runs([tmp_path])
    assert [(n, run.name) for n, run in runs.now()] == [(0, "2-class"), (1, "1-none")]
    shutil.copytree(logs / "3-text", tmp_path / "3-text")
    shutil.rmtree(tmp_path / "2-class")
    assert [(n, run.name, bool(run.problem())) for n, run in runs.now()] == [
        (2, "3-text", False), (0, "2-class", True), (1, "1-none", False),
    ]  # fmt: skip
    shutil.rmtree(tmp_path)
    assert len(runs.now()) == 3 and all(run.problem() for _, run in runs.now())


@pytest.mark.parametrize("content", [b"step,x\n1," + b"9" * 200_000, b"\x00\xff" * 50, b""])
def test_damaged_metrics_are_told_or_left_out(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    try:
        assert not RunView(tmp_path).curves()
    except UserError as error:
        assert "metrics.csv" in str(error)  # noqa: PT017 - either will do
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(UserError, match="metrics.csv"):
        RunView(tmp_path).curves()


def test_evaluations(logs, tmp_path):
    run = tmp_path / "run"
    contents = {
        "a": '{"values": {"frechet": 1.5, "bad": NaN, "note": "x"}, "n": 8, "intervals": '
        '{"frechet": {"low": 1.2, "high": 1.9, "deviations": []}}}',
        "b": '{"values": {"frech',
        "c": "[]",
        "d": '{"values": {"kernel": 2}, "intervals": {"kernel": "x"}}',
    }
    for name, content in contents.items():
        (run / name).mkdir(parents=True)
        (run / name / "evaluation.json").write_text(content)
    (run / "a" / "samples.png").write_bytes(b"images")
    a, b, c, d = RunView(run).evaluations()
    assert (a["name"], a["n"], a["sheet"], d["sheet"]) == ("a", 8, True, False)
    assert [(f["name"], f["value"], f["interval"]) for f in a["figures"] + d["figures"]] == [
        ("frechet", 1.5, [1.2, 1.9]), ("bad", None, None), ("kernel", 2.0, None),
    ]  # fmt: skip
    assert "is it being written?" in b["problem"] and "c/evaluation.json" in c["problem"]
    assert RunView(run).sheet(0) == b"images"
    for number in (3, 4):
        with pytest.raises(UserError, match="evaluation 4|samples.png"):
            RunView(run).sheet(number)


def test_nothing_outside_of_a_run_is_reached_by_its_links_and_no_pipe_is_waited_for(logs, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("password\x00IEND\xaeB`\x82", encoding="latin-1")
    for kind in (lambda path: path.symlink_to(secret), lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        folder = tmp_path / "run"
        shutil.copytree(logs / "1-none", folder)
        run = RunView(folder)
        ((_, ((_, image), *_)),) = run.images().items()
        places = [folder / image, folder / "metrics.csv", folder / "configs" / "config.yaml"]
        places += [folder / "e" / name for name in ("evaluation.json", "samples.png")]
        (folder / "e").mkdir()
        for place in places:
            place.unlink(missing_ok=True)
            kind(place)
        for read in (
            run.config,
            run.curves,
            lambda run=run, image=image: run.image(image),
            lambda run=run: run.sheet(0),
        ):
            with pytest.raises(UserError, match="no file of the run|no config"):
                read()
        assert all("no file of the run" in entry["problem"] for entry in run.evaluations())
        shutil.rmtree(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"values": {"x": 1%s}}' % ("0" * 400), '{"values": {}, "n": NaN}'])
def test_a_hostile_evaluation_hides_no_other(tmp_path, text):
    for name, content in (("a", text), ("b", '{"n": 3, "values": {"x": 0.5}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(content)
    first, second = RunView(tmp_path).evaluations()
    assert second["n"] == 3 and [figure["value"] for figure in second["figures"]] == [0.5]
    json.dumps(first, allow_nan=False)
