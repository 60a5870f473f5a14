"""The jobs of ablation/test_runner.py; nothing heavy is imported, so that their processes begin at once."""

from pathlib import Path

from ldm.ablation.runner import DeviceSlot
from ldm.ablation.workspace import Workspace

Line = tuple[str, str]  # name of a step, and the line of Python that is its work


def do_lines(folder: Path, lines: tuple[Line, ...], slot: DeviceSlot) -> None:
    """Do steps one after the other; each appends its name to the file `order` first."""
    workspace = Workspace(folder)
    for name, line in lines:

        def work(name: str = name, line: str = line) -> dict[str, str]:
            with (folder / "order").open("a") as file:
                file.write(f"{name} ")
            exec(line, {})
            return {"name": name}

        workspace.once(name, work)
