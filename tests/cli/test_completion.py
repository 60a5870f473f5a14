"""The script that completes `ldm`, run by bash: it knows what the parsers know, and starts no Python."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from ldm.cli import completion, train
from ldm.cli.arguments import TaskParser, parser_of
from ldm.cli.program import COMMANDS
from ldm.config import shipped

bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the script as the command does."""
    from contextlib import redirect_stdout

    file = tmp_path_factory.mktemp("completion") / "ldm.bash"
    with file.open("w") as out, redirect_stdout(out):
        assert completion.main(["bash"]) == 0
    return file


def completed(script: Path, folder: Path, *lines: str) -> list[list[str]]:
    """Return what bash offers for the last word of each line, whose words are separated by `|`."""
    calls = [
        f"COMP_WORDS=({' '.join(map(repr, line.split('|')))}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _ldm; "
        'echo "${COMPREPLY[*]}"'
        for line in lines
    ]
    program = "\n".join(["PATH=", f"source {script}", *calls])  # no other program is called
    done = subprocess.run(["/bin/bash", "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert not done.stderr
    return [line.split() for line in done.stdout.split("\n")[:-1]]


@bash
def test_commands_flags_values_configs_and_runs(script: Path, tmp_path: Path) -> None:
    for name in ("logs/2026_a", "logs/2026_b", "other/run"):
        (tmp_path / name / "configs").mkdir(parents=True)
    (tmp_path / "logs" / "none").mkdir()
    runs = ["logs/2026_a", "logs/2026_b"]
    expected = {
        "ldm|se": ["semantic2img", "serve"],
        "ldm|doctor|": ["data", "first-stage", "config", "plan"],
        "ldm|doctor|plan|--pr": ["--precision", "--price"],
        "ldm|doctor|first-stage|--run|": runs,
        "ldm|train|ldm/sit_": [name for name in shipped.names() if name.startswith("ldm/sit_")],
        "ldm|train|--base|ldm/ffhq|ldm/sit_x": ["ldm/sit_xl"],
        "ldm|train|--base|=|ldm/ff": ["ldm/ffhq"],
        "ldm|train|--no": ["--no-test"],
        "ldm|train|ldm/ffhq|-r|other/": ["other/run"],
        "ldm|sample|--run|logs/2026_a|--prec": ["--precision"],
        "ldm|sample|--precision|": ["32", "bf16", "16"],
        "ldm|sample|--skip_grid|--precision|b": ["bf16"],
        "ldm|config|s": ["show", "schema"],
        "ldm|config|show|ldm/ff": ["ldm/ffhq"],
        "ldm|serve|logs/2026_a|": runs,
        "ldm|serve|--port|": [],
        "ldm|export|--out|": [],
        "ldm|completion|": ["bash", "zsh"],
        "ldm|absent|": [],
    }
    assert dict(zip(expected, completed(script, tmp_path, *expected), strict=True)) == expected


@bash
def test_a_name_of_a_folder_is_never_run(script: Path, tmp_path: Path) -> None:
    for name in ("run$(touch${IFS}made)", "run`touch${IFS}made`", "run;touch made"):
        (tmp_path / "logs" / name / "configs").mkdir(parents=True)
    (offered,) = completed(script, tmp_path, "ldm|serve|logs/run")
    assert "logs/run\\$\\(touch" in offered[0] and not list(tmp_path.rglob("made"))


@bash
def test_every_flag_of_every_command_is_offered(script: Path, tmp_path: Path) -> None:
    """As the parsers have them, so that no list of flags can fall behind."""
    parsers = dict(completion.nested({name: parser_of(completion.module_of(name).main) for name in COMMANDS}))
    assert {"train", "doctor plan", "serve", "completion"} <= set(parsers)
    lines = [f"ldm|{name.replace(' ', '|')}|-" for name in parsers]
    for (name, parser), offered in zip(parsers.items(), completed(script, tmp_path, *lines), strict=True):
        shown = [
            flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS
        ]
        assert offered == shown, name


def test_asking_for_a_parser_runs_nothing_and_leaves_nothing() -> None:
    parser = parser_of(train.main)
    assert isinstance(parser, TaskParser) and "--dry-run" in parser.format_help()
    assert parser.parse_args(["--seed", "3"]).seed == 3  # it is asked for no longer
    with pytest.raises(TypeError, match="has no TaskParser"):
        parser_of(lambda words: 0)


def test_zsh_gets_the_same_by_its_own_adapter(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main(["zsh"]) == 0
    head, _, rest = capsys.readouterr().out.partition("# Completion of ldm")
    assert "bashcompinit" in head and script.read_text() == f"# Completion of ldm{rest}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_what_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beginnings and tabulators, typed into a terminal in which `ldm` only says what it was given."""
    assert completion.main(["zsh"]) == 0
    file = tmp_path / "ldm.zsh"
    file.write_text(capsys.readouterr().out)
    program = f"""
        zmodload zsh/zpty
        zpty -b terminal zsh -f -i
        zpty -w terminal 'autoload -Uz compinit; compinit -u -D; source {file}; ldm() {{ print "GIVEN:$*:" }}'
        zpty -w terminal 'print REA""DY'
        zpty -r terminal out '*READY*'
        zpty -w -n terminal $'ldm conf\\tsh\\tldm/ff\\t\\n'
        zpty -r terminal out '*GIVEN:*:*'
        print -r -- $out
        zpty -d terminal
    """
    done = subprocess.run(["zsh", "-f", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "GIVEN:config show ldm/ffhq:" in done.stdout
