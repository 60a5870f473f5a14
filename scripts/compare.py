"""Compare the values of two evaluations, or say why they cannot be compared.

python scripts/compare.py outputs/eval/a/evaluation.json outputs/eval/b/evaluation.json
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.common import main_guard
from ldm.evaluation.comparison import compare, read_result

_log = logging.getLogger("ldm.compare")


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Compare two results of scripts/evaluate.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args(argv)
    found = compare(read_result(options.first), read_result(options.second))
    for name, (first, second) in found.values.items():
        _log.info("%-32s %12.6g %12.6g %+12.3g", name, first, second, second - first)
    for line in found.settings:
        _log.info("differs: %s", line)
    if found.alone:
        _log.info("in one of them alone: %s", ", ".join(found.alone))


if __name__ == "__main__":
    main()
