"""The configs that come with the project, and what editors need to complete and check one's own.

    ldm config list                         names, which --base and --config take as well as files
    ldm config show ldm/ffhq [KEY=VALUE]    the whole config, with all that it is based on
    ldm config show FOLDER                  that of a model: a run, an exported file, a folder of diffusers
    ldm config schema > ldm.schema.json     for editors

VS Code (YAML extension) and PyCharm complete and check a file whose first line is

    # yaml-language-server: $schema=ldm.schema.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from ldm import compat
from ldm.cli.arguments import parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser
from ldm.config import schema, shipped
from ldm.config.overrides import apply_overrides
from ldm.config.targets import did_you_mean
from ldm.errors import UserError
from ldm.models.loading import read_config
from ldm.training.plan import lightning_hints


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """List or show shipped configs, or write the schema."""
    parser = TaskParser("config", __doc__)
    parser.add_argument("action", choices=("list", "show", "schema"))
    parser.add_argument("name", nargs="?", metavar="YAML", help="of show: a file, a model, or a name as list prints it")
    options = parse_with_overrides(parser, argv)
    if options.action != "show" and (options.name or options.overrides):
        raise UserError(f"ldm config {options.action}: takes no further words")
    if options.action == "show":
        sys.stdout.write(_show(options.name, options.overrides))
    else:
        sys.stdout.write(_list() if options.action == "list" else _schema())


def _list() -> str:
    names = shipped.names()
    width = max(map(len, names))
    return "".join(f"{name:{width}}  {shipped.title(name)}\n" for name in names)


def _show(name: str | None, overrides: Sequence[str]) -> str:
    if name is None:
        raise UserError("ldm config show: name a config; ldm config list prints the shipped ones")
    file = shipped.find(name)
    if Path(name).exists() and not name.endswith((".yaml", ".yml")):
        content = apply_overrides(read_config(Path(name)), overrides)
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if file == name and not name.endswith((".yaml", ".yml")):
        raise UserError(f"{name}: no such config{did_you_mean(name, shipped.names()) or '; see ldm config list'}")
    return yaml.safe_dump(compat.read(file, overrides), sort_keys=False, allow_unicode=True)


def _schema() -> str:
    return json.dumps(schema.schema(*lightning_hints()), separators=(",", ":")) + "\n"
