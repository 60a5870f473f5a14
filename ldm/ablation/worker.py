"""The process of one job: python -m ldm.ablation.worker JOB.json DONE.json calls a function and writes its result."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from pathlib import Path

from ldm.ablation.workspace import write_json
from ldm.errors import UserError


def main(job: Path, done: Path) -> None:
    """Call what JOB.json names; nothing is written if it raises."""
    content = json.loads(job.read_text(encoding="utf-8"))
    module, _, name = content["function"].rpartition(".")
    start = time.monotonic()
    result = getattr(importlib.import_module(module), name)(**content["arguments"])
    seconds = time.monotonic() - start if content["is_first_attempt"] else None
    write_json(done, {"seconds": seconds, "result": result})


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ldm").setLevel(logging.INFO)
    try:
        main(*map(Path, sys.argv[1:]))
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
