"""The layers of docs/architecture.md, enforced: who may import whom, and what each may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ldm"

LEAVES = (
    "allowance",
    "errors",
    "bounds",
    "distributed",
    "pairs",
    "transfer",
    "writing",
)  # every layer may import these
# Each layer -> the layers that it may import, besides itself and the leaves.
ARROWS = {
    "allowance": set(),
    "errors": set(),
    "bounds": set(),
    "pairs": set(),
    "environment": set(),
    "aliases": set(),
    "distributed": set(),
    "transfer": set(),
    "writing": set(),
    "weights": {"compat"},  # the names of foreign files
    "config": {"weights"},
    "compat": {"config"},
    "diffusion": set(),
    "networks": {"distributed", "weights"},
    "data": {"distributed"},
    "images": {"data", "environment"},
    "autoencoder": {"aliases", "distributed", "networks"},
    "conditioning": {"aliases", "networks", "weights"},
    "sampling": {"aliases", "diffusion"},
}
LIBRARY = set(ARROWS)
ARROWS["models"] = LIBRARY
ARROWS["training"] = LIBRARY | {"models", "evaluation", "doctor"}
ARROWS["evaluation"] = LIBRARY | {"models"}
ARROWS["toy"] = LIBRARY | {"models", "evaluation", "training"}
ARROWS["doctor"] = LIBRARY | {"models", "training", "evaluation"}
ARROWS["ablation"] = LIBRARY | {"models", "training", "evaluation"}
ARROWS["serve"] = LIBRARY | {"models"}
EVERYTHING = set(ARROWS) | {"cli"}
ARROWS["cli"] = EVERYTHING

LIGHTNING = {"pytorch_lightning", "lightning", "lightning_utilities", "lightning_fabric"}
USES_LIGHTNING = {"training", "cli", "models", "doctor", "ablation", "toy"}
WITHOUT_TORCH = {"errors", "compat"}

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """List the dotted names that a file imports, also inside functions; relative imports resolved."""
    names: set[str] = set()
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            base = package[: len(package) - statement.level + 1] if statement.level else []
            module = ".".join([*base, *([statement.module] if statement.module else [])])
            names |= {f"{module}.{alias.name}" for alias in statement.names}
    return names


def imported_layers(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("ldm.")} & EVERYTHING


def test_every_part_of_the_package_has_a_place() -> None:
    unplaced = {layer(path) for path in FILES} - EVERYTHING - {"__init__", "__main__"}
    assert not unplaced, f"name what these may import in ARROWS: {sorted(unplaced)}"


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_a_layer_imports_only_what_its_arrows_point_at(name: str) -> None:
    allowed = ARROWS[name] | {name, *LEAVES}
    wrong = [
        f"{path.relative_to(ROOT)} imports {', '.join(sorted(imported_layers(path) - allowed))}"
        for path in FILES
        if layer(path) == name and imported_layers(path) - allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_only_training_and_cli_know_lightning() -> None:
    for path in FILES:
        if layer(path) not in USES_LIGHTNING:
            assert not {name.split(".")[0] for name in imports(path)} & LIGHTNING, path


def test_the_translation_of_configs_needs_no_torch() -> None:
    for path in FILES:
        if layer(path) in WITHOUT_TORCH:
            assert not {name.split(".")[0] for name in imports(path)} & {"torch", "numpy"}, path


def test_scripts_and_main_import_the_package_but_not_each_other() -> None:
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    names = {path.stem for path in scripts} | {"scripts"}
    for path in [*scripts, *ROOT.glob("main.py")]:
        assert not {name.split(".")[0] for name in imports(path)} & names, path


def test_importing_is_cheap() -> None:
    """Below training nothing imports Lightning, transformers or wandb, and reading a config imports no torch."""
    light = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if layer(path) in ARROWS]
    light = [name.removesuffix(".__init__") for name in light if name.split(".")[1] not in USES_LIGHTNING]
    program = f"""
import importlib, sys
import ldm.config
assert "torch" not in sys.modules, "ldm.config imports torch"
for name in {light!r}:
    importlib.import_module(name)
heavy = {sorted(LIGHTNING | {"transformers", "wandb", "webdataset"})!r}
assert not set(heavy) & set(sys.modules), sorted(set(heavy) & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
