"""What the documentation takes from elsewhere: images, the page on data, the list of shipped configs, the notebooks."""

import base64
import importlib.util
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = "<!-- the shipped configs -->"
KINDS = {
    "ldm": "Latent diffusion models",
    "autoencoder": "First stages",
    "stability": "Stable Diffusion",
    "own": "Your own data",
    "demo": "Small ones, for a laptop",
    "ablation": "Studies",
}


def on_files(files: Files, config: Any) -> Files:
    """Add data/README.md and the images in data/pictures under these names, and a page for each notebook."""
    for path in [ROOT / "data/README.md", *sorted((ROOT / "data/pictures").iterdir())]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        for name, content in _notebook(path):
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links out of docs/ and to notebooks at what `on_files` added, and list the configs."""
    markdown = markdown.replace("](../data/", "](data/")
    markdown = re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)
    return markdown.replace(CONFIGS, "\n".join(_configs())) if CONFIGS in markdown else markdown


def _notebook(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yield name and content of the page of a notebook, and of each of its images."""
    lines, number = [], 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        lines += [source, ""] if cell["cell_type"] == "markdown" else ["```python", source, "```", ""]
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                number += 1
                yield f"{path.stem}_{number}.png", base64.b64decode("".join(data["image/png"]))
                lines += [f"![output {number}]({path.stem}_{number}.png)", ""]
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                lines += ["```text", text.rstrip(), "```", ""]
    yield f"{path.stem}.md", "\n".join([*lines, f"The notebook itself: [{path.name}]({path.name}).", ""])


def _configs() -> list[str]:
    """Return a table for each folder of configs, with what their first lines say, and the files below it."""
    shipped = _shipped()
    lines = []
    for kind, names in groupby(sorted(shipped.names(), key=_place), key=lambda name: name.split("/")[0]):
        group = {name: (shipped.folder() / f"{name}.yaml").read_text(encoding="utf-8") for name in names}
        lines += [f"## {KINDS[kind]}", "", "| config | what it is, and where its figures come from |", "|---|---|"]
        lines += [f"| `{name}` | {_provenance(text)} |" for name, text in group.items()]
        lines += [""]
        for name, text in group.items():
            lines += [f'??? note "configs/{name}.yaml"', "", "    ```yaml"]
            lines += [f"    {line}".rstrip() for line in text.splitlines()] + ["    ```", ""]
    return lines


def _place(name: str) -> tuple[int, str]:
    return list(KINDS).index(name.split("/")[0]), name


def _provenance(text: str) -> str:
    """Return the comment at the beginning of a config without its commands, as a cell of a table."""
    comment = re.match(r"(#.*\n)+", text)
    lines = [line.lstrip("# ") for line in comment[0].splitlines()] if comment else []
    return " ".join(line for line in lines if not line.startswith("python ")).replace("|", "\\|").replace("*", "\\*")


def _shipped() -> ModuleType:
    """Import ldm.config.shipped alone, so that the documentation builds where torch is not installed."""
    spec = importlib.util.spec_from_file_location("shipped", ROOT / "ldm/config/shipped.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
