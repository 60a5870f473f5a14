"""Show runs on a local web page: curves, images over time, configs, and samples with every setting.

ldm serve logs                     all runs in a folder, or several run folders
ldm serve logs/RUN --port 8000
ldm serve logs --host 0.0.0.0      to others as well: the address that is printed holds the token that they need
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser, choose_device
from ldm.serve.drawing import Studio
from ldm.serve.runs import Runs
from ldm.serve.server import Server, Site
from ldm.training.interrupt import stopped_by_sigterm


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    parser = TaskParser("serve", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of them")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=7860, help="port to listen on; 0 takes a free one (default 7860)")
    outdir = "where images that are drawn go, each run's into a folder of its name (default outputs/serve)"
    add("-l", "--outdir", type=Path, default=Path("outputs/serve"), metavar="DIR", help=outdir)
    add("--device", default="auto", help="where samples are drawn: auto, cpu, or a device as torch names it")
    options = parser.parse_args(argv)
    runs, is_local = Runs(options.runs), options.host in ("127.0.0.1", "localhost", "::1")
    studio = Studio(choose_device(options.device), options.outdir)
    server = Server(options.host, options.port, Site(runs, studio), "" if is_local else secrets.token_urlsafe(16))
    sys.stdout.write(f"{len(runs.now())} runs at {server.address} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    try:
        with stopped_by_sigterm():
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        studio.stop()
