"""README, docs/ and data/README.md: links lead somewhere, commands parse, Python runs, YAML loads, names exist."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import text_config
from tiny_runs import diffusion_config, script, write_run

from ldm import compat
from ldm.ablation.study import read
from ldm.cli.arguments import parse
from ldm.cli.program import COMMANDS, module_of, spelled_out
from ldm.config import shipped
from ldm.config.check import check
from ldm.config.nodes import SECTIONS
from ldm.config.overrides import split_overrides

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [*ROOT.glob("docs/**/*.md"), ROOT / "data/README.md"]}
PAGES["README.md"] = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAM = re.compile(r"^(?:\w+=\S+ )*(?:python|ldm|torchrun|sbatch|make|pip|conda) ")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|[*<$]")  # what is the reader's: IMAGES, logs/RUN, <time>
OTHERS = {"source"}  # programs that are not ours

each_page = pytest.mark.parametrize("page", sorted(PAGES))


class Parsed(Exception):
    """A parser has accepted its command line, and the program is not to go on."""


# ------------------------------------------------------------------------------------------------ what is in the pages


@cache
def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return [block for found, block in FENCE.findall(text_of(page)) if found == language]


def prose(page: str) -> str:
    """Return a page without its blocks, and without the column of foreign names in tables that translate them."""
    text = FENCE.sub("", text_of(page))
    return re.sub(r"^\|[^|]*", "", text, flags=re.MULTILINE) if page == "docs/coming_from.md" else text


def spans(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def indented(page: str) -> Iterator[str]:
    """Yield the paragraphs of blocks without a fence, which data/README.md has."""
    for block in INDENTED.findall(FENCE.sub("", text_of(page))):
        yield from re.sub(r"^ {4}", "", block, flags=re.MULTILINE).split("\n\n")


def commands(page: str) -> list[str]:
    """Return the lines of the blocks, and what else looks like a command."""
    others = "\n".join(indented(page)).replace("\\\n", " ").splitlines() + spans(page)
    named = [line for line in others if PROGRAM.match(line) and "..." not in line]
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines() + named
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


# ------------------------------------------------------------------------------------------------------- pages, links


def slugs(page: str) -> set[str]:
    """Return the anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@each_page
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in LINK.findall(prose(page) if page != "docs/coming_from.md" else text_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        path = (PAGES[page].parent / file).resolve() if file else PAGES[page]
        assert path.exists() and path.is_relative_to(ROOT), f"{page}: {link}"
        if anchor:
            assert anchor in slugs(path.relative_to(ROOT).as_posix()), f"{page}: {link}"


def test_every_page_is_in_the_navigation_once() -> None:
    def pages(entry: Any) -> list[str]:
        inner = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else None
        return [entry] if inner is None else list(itertools.chain.from_iterable(map(pages, inner)))

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    notebooks = [f"notebooks/{path.stem}.md" for path in ROOT.glob("docs/notebooks/*.ipynb")]  # made by docs/hooks.py
    written = [page.removeprefix("docs/") for page in PAGES if page != "README.md"]
    assert sorted(listed) == sorted([*written, *notebooks])


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150


@each_page
def test_every_block_says_its_language(page: str) -> None:
    assert {language for language, _ in FENCE.findall(text_of(page))} <= {"bash", "python", "yaml", "text"}


def test_the_reference_names_modules_that_exist() -> None:
    for page in filter(lambda name: name.startswith("docs/reference/"), PAGES):
        for name in re.findall(r"^::: (\S+)", text_of(page), re.MULTILINE):
            assert importlib.util.find_spec(name), f"{page}: {name}"


# --------------------------------------------------------------------------------------------------- names in the text


def expanded(pattern: str) -> list[str]:
    """Expand braces as a shell does."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    choices = [part if index % 2 else [",".join(part)] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


@each_page
def test_paths_exist(page: str) -> None:
    named = [span for span in spans(page) if re.fullmatch(r"(configs|scripts|tests|docs|ldm)/[\w./{},*-]+", span)]
    for path in itertools.chain.from_iterable(map(expanded, named)):
        choices = (path, f"{path}.yaml", f"{path}.py", f"configs/{path}.yaml")
        assert PLACEHOLDER.search(path.replace("*", "")) or any(any(ROOT.glob(choice)) for choice in choices), path


@each_page
def test_dotted_names_exist(page: str) -> None:
    for found in filter(re.compile(r"ldm(\.\w+)+(?<!\.json)").fullmatch, spans(page)):
        module, names = found, []
        while not _is_module(module):
            module, _, name = module.rpartition(".")
            names.insert(0, name)
        holder = importlib.import_module(module)
        for name in names:
            assert hasattr(holder, name), found
            holder = getattr(holder, name)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# ------------------------------------------------------------------------------------------------------------ commands


@each_page
def test_commands_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in commands(page):
        with monkeypatch.context() as patch:
            try:
                _check_line(line, patch)
            except SystemExit as error:
                pytest.fail(f"{page}: {line}: {error}")


def _check_line(line: str, patch: pytest.MonkeyPatch) -> None:
    words = shlex.split(re.sub(r"\$\w+", "0", line), comments=True)
    words = list(itertools.dropwhile(re.compile(r"\w+=").match, words))
    if ">" in words:  # what the shell does with the output
        words = words[: words.index(">")]
    if words[0] in OTHERS or "COMMAND" in line:
        return
    words = [word.replace("STUDY", "configs/ablation/toy_f.yaml").replace("my_package", "tiny") for word in words]
    for word in filter(re.compile(r"(configs|scripts|tests|docs)/[\w/]+(\.\w+)?$").match, words):
        assert PLACEHOLDER.search(word) or (ROOT / word).exists(), f"{line}: {word}"
    _check(words, patch)


def _check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = words
    if program == "torchrun":  # its own flags have a value each
        first = next(index for index, word in enumerate(rest) if word.endswith(".py"))
        _check(["python", *rest[first:]], monkeypatch)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in rest:
            name, _, value = word.partition("=")
            assert re.search(rf"\$\({name}\)" if value else rf"^{name}:", makefile, re.MULTILINE), word
    elif program == "pip":
        extras = re.findall(r"^ +\"(\w+)\": \[", (ROOT / "setup.py").read_text(), re.MULTILINE)
        assert set(re.findall(r"\.\[(\w+)\]", " ".join(rest))) <= set(extras)
    elif program == "conda":
        assert (ROOT / rest[rest.index("--file") + 1]).is_file()
    elif program == "ldm":
        name, given = spelled_out(rest)
        assert name in COMMANDS or name == "--help", name
        if name == "train":
            _check_training(given)
        elif given:
            _check_arguments(module_of(name), [name, *given], monkeypatch)
    elif words[:3] == ["python", "-m", "pytest"]:
        _check_tests(rest[2:])
    elif program == "sbatch" or rest[0] == "main.py":
        assert (ROOT / rest[0]).is_file()
        _check_training(rest[1:])
    elif program == "python" and rest[0].startswith("scripts/"):
        name = Path(rest[0]).stem
        is_benchmark = "benchmarks" in rest[0]
        _check_arguments(importlib.import_module(name) if is_benchmark else script(name), rest, monkeypatch)
    else:
        assert words[:3] == ["python", "-m", "http.server"], words


def _check_training(words: list[str]) -> None:
    """Parse a training's command line, and check overrides where it names configs that exist."""
    arguments = parse(words)
    if arguments.base and not any(PLACEHOLDER.search(name) for name in arguments.base):
        _load(tuple(arguments.base), tuple(arguments.overrides))


@cache
def _load(base: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    compat.load([name if Path(name).is_absolute() else ROOT / name for name in base], overrides)


def _check_arguments(program: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the parser of a program accept the words, and check the overrides of a shipped config."""
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, _stopping(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed) as accepted:
        program.main()
    options = vars(accepted.value.args[0])
    base = options.get("base") or []
    for name in [*base, *filter(None, [options.get("config")])]:
        known = any(Path(path).is_file() for path in (name, ROOT / name, shipped.folder() / f"demo/{name}.yaml"))
        assert PLACEHOLDER.search(name) or known, name
    if base and not any(PLACEHOLDER.search(name) for name in base):
        _load(tuple(base), tuple(split_overrides(words[1:])[0]))


def _stopping(parse_words: Callable[..., argparse.Namespace]) -> Callable[..., None]:
    """Let a parser hand what it read to the test, and the program end there."""

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> None:
        raise Parsed(parse_words(self, *given))

    return parse_and_stop


def _check_tests(words: list[str]) -> None:
    markers = re.findall(r"^    \"(\w+): ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    while words:
        word = words.pop(0)
        if word == "-m":
            assert set(words.pop(0).split()) <= {*markers, "or", "and", "not"}
        else:
            assert (ROOT / word).exists(), word


# ------------------------------------------------------------------------------------------------------ Python and YAML


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny run of text to image, as logs/RUN."""
    folder = tmp_path_factory.mktemp("place")
    write_run(folder / "logs/RUN", diffusion_config(text_config(), context_dim=8))
    return folder


@pytest.mark.parametrize("page", [page for page in sorted(PAGES) if blocks(page, "python")])
def test_python_runs(page: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page one after the other, where logs/RUN is a tiny model."""
    (tmp_path / "logs").symlink_to(run / "logs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "block"}
    monkeypatch.setitem(sys.modules, "block", argparse.Namespace(**names))
    torch.manual_seed(0)
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec", dont_inherit=True), names)


@each_page
def test_yaml_is_valid(page: str, tmp_path: Path) -> None:
    for folder in ("configs", "demo"):  # beside which a reader's own file lies
        (tmp_path / folder).symlink_to(ROOT / "configs" / folder.replace("configs", ""))
    (tmp_path / "studies").mkdir()
    for block in [*blocks(page, "yaml"), *(part for part in indented(page) if re.search(r"\btarget:", part))]:
        content = yaml.safe_load(block)
        own = tmp_path / ("studies" if "axes" in content else "") / "own.yaml"
        own.write_text(block)
        if "axes" in content:
            read(own)
        elif set(content) & set(SECTIONS):
            compat.load(own, check="my_" not in block)  # what a reader writes is not there
        else:
            check(content, page)


def test_named_tests_exist() -> None:
    """Tests that a page names as tests/FILE.py::NAME are there; every row of docs/verified.md names one."""
    for page in PAGES:
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text_of(page)):
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
    rows = [line for line in text_of("docs/verified.md").splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("|---", "| what "))]
    assert len(rows) > 30 and all(re.search(r"`tests/[\w/]+\.py(::\w+)?`", row.split("|")[-2]) for row in rows)
