"""Compare the values of two evaluations, or say why they cannot be compared.

ldm compare outputs/eval/a/evaluation.json outputs/eval/b/evaluation.json

Each line has a value of both, their difference and its 95% interval; "not distinguishable" where zero is inside.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser
from ldm.evaluation.comparison import compare, read_result

_log = logging.getLogger(__name__)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Compare two results of `ldm evaluate`."""
    parser = TaskParser("compare", __doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    given = parser.parse_args(argv)
    found = compare(read_result(given.first), read_result(given.second))
    for name, (first, second) in found.values.items():
        verdict = found.differences[name].verdict()
        _log.info("%-32s %12.6g %12.6g %+12.3g   %s", name, first, second, second - first, verdict)
    for line in found.settings:
        _log.info("differs: %s", line)
    if found.alone:
        _log.info("in one of them alone: %s", ", ".join(found.alone))
