"""Whose code a config may call: what is named on the command line, by the environment, or by one's own YAML."""

import json
import sys
from contextvars import copy_context
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from ldm.cli.arguments import parse
from ldm.cli.entry import main_guard
from ldm.cli.train import plan_of
from ldm.conditioning.tokenizers import HuggingFaceTokenizer
from ldm.config import allow
from ldm.config.plain import resolve
from ldm.config.schema import _targets
from ldm.config.targets import find_target, is_slip
from ldm.errors import UserError

CODE = """
from os import system
from subprocess import Popen

class Items:
    def __init__(self, size):
        self.size = size
    def __len__(self):
        return 4
    def __getitem__(self, index):
        raise IndexError
    @classmethod
    def of(cls, size) -> "Items":
        return cls(size)

def make(size: int) -> Items:
    return Items(size)

def silent(size):
    return Items(size)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Write a module of one's own into the working folder; give its name."""
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    return name


def write(path: Path, target: str) -> str:
    """Write a config whose training set is of a class."""
    training = tiny.autoencoder_training_config()
    data = {"target": target, "params": {"size": tiny.SIZE}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tiny.run_config(training, data, data)))
    return str(path)


def planned(*words: str) -> str:
    """Return why a command line is refused, empty if it is not; what it allows ends with it."""
    try:
        copy_context().run(lambda: plan_of(parse([*words, "--accelerator", "cpu", "--devices", "1"])))
    except UserError as error:
        return str(error)
    return ""


def run_folder(tmp_path: Path, target: str) -> str:
    write(tmp_path / "run" / "configs" / "config.yaml", target)
    (tmp_path / "run" / "configs" / "environment.json").write_text('{"seed": 23}')
    (tmp_path / "run" / "checkpoints").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return str(tmp_path / "run")


@pytest.mark.parametrize("name", ["Items", "Items.of", "make"])
def test_a_module_of_the_working_folder_may_be_named_by_base(module: str, tmp_path: Path, name: str) -> None:
    assert planned("--base", write(tmp_path / "a.yaml", f"{module}.{name}")) == ""


@pytest.mark.parametrize("name", ["system", "Popen", "silent", "Items.__len__", "Items.size", "nothing"])
def test_but_not_what_is_only_imported_there_or_makes_nothing(module: str, tmp_path: Path, name: str) -> None:
    assert f"data.params.train.target: {module}" in planned("--base", write(tmp_path / "a.yaml", f"{module}.{name}"))


def test_a_run_is_not_trusted_unless_the_command_line_says_so(module: str, tmp_path: Path, monkeypatch) -> None:
    run, base = run_folder(tmp_path, f"{module}.Items"), write(tmp_path / "a.yaml", f"{module}.Items")
    assert f"--allow {module}" in planned("-r", run)
    assert f"--allow {module}" in planned("-r", run, f"data.params.train.target={module}.Items")
    assert planned("-r", run, "--allow", module) == ""
    assert planned("-r", run, "--base", base) == ""  # whose YAML is one's own


def test_the_environment_says_so_too(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_ALLOW", f"another, {module}")
    assert planned("-r", run_folder(tmp_path, f"{module}.Items")) == ""


def test_nor_is_what_a_node_takes_from_a_run(module: str, tmp_path: Path) -> None:
    write(tmp_path / "run" / "configs" / "config.yaml", f"{module}.Items")
    base = tmp_path / "a.yaml"
    content = yaml.safe_load(Path(write(base, "ldm.toy.shapes.Shapes")).read_text())
    content["data"]["params"]["train"] = {"run": str(tmp_path / "run")}
    base.write_text(yaml.safe_dump(content))
    assert f"--allow {module}" in planned("--base", str(base))
    content["data"]["params"]["train"] = {"base": "run/configs/config.yaml"}
    base.write_text(yaml.safe_dump(content))
    assert "--allow" not in planned("--base", str(base))


def test_what_writes_where_a_run_says_is_for_no_config() -> None:
    with pytest.raises(UserError, match="not trusted"):
        find_target("ldm.training.lightning_fixes.metrics_csv.MetricsCsv")
    assert find_target("ldm.training.lightning_fixes.checkpoints.Checkpoints")


WRITE_OR_RUN = [
    "torch.utils.data.datapipes.iter.routeddecoder.RoutedDecoderIterDataPipe",
    "torch.utils.data.datapipes.iter.FileOpener",
    "torch.utils.data.DataLoader",
    "torch.optim.swa_utils.AveragedModel",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.OnExceptionCheckpoint",
    "pytorch_lightning.callbacks.LearningRateFinder",
    "pytorch_lightning.callbacks.LambdaCallback",
    "pytorch_lightning.loggers.CometLogger",
    "pytorch_lightning.plugins.TorchCheckpointIO",
    "pytorch_lightning.profilers.SimpleProfiler",
    "pytorch_lightning.strategies.DeepSpeedStrategy",
]


@pytest.mark.parametrize("target", WRITE_OR_RUN)
def test_a_run_names_nothing_of_others_that_writes_or_runs_what_it_reads(target: str, tmp_path: Path) -> None:
    run, base = run_folder(tmp_path, target), write(tmp_path / "a.yaml", target)
    assert "not trusted" in (said := planned("-r", run)) or f"--allow {target}" in said, said
    assert "--allow" not in planned("-r", run, "--allow", target)
    assert "--allow" not in planned("--base", base)


@pytest.mark.parametrize(
    "target",
    ["torch.nn.Linear", "torch.optim.Muon", "torch.optim.lr_scheduler.CosineAnnealingLR", "torch.utils.data.Subset",
     "torchvision.transforms.RandomCrop", "torchvision.transforms.v2.RandomCrop", "pytorch_lightning.callbacks.Timer",
     "pytorch_lightning.loggers.csv_logs.CSVLogger", "pytorch_lightning.strategies.DDPStrategy"],
)  # fmt: skip
def test_but_what_computes(target: str) -> None:
    assert find_target(target)


ELSEWHERE = {
    "save_dir": {"logger": {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"save_dir": "elsewhere"}}},
    "name": {"logger": {"target": "pytorch_lightning.loggers.TensorBoardLogger", "params": {"name": "../elsewhere"}}},
    "tracking_uri": {
        "logger": {"target": "pytorch_lightning.loggers.MLFlowLogger", "params": {"tracking_uri": "http://a.b"}}
    },
    "directory": {"modelcheckpoint": {"params": {"directory": "~/elsewhere"}}},
    "images.params.directory": {
        "callbacks": {"images": {"target": "ldm.training.callbacks.ImageLogger", "params": {"directory": "/elsewhere"}}}
    },
    "folder": {"cache_latents": {"folder": "/elsewhere"}},
}


def test_no_node_makes_the_name_of_a_place(tmp_path: Path) -> None:
    run = Path(run_folder(tmp_path, "ldm.toy.shapes.Shapes"))
    config = run / "configs" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    text = {"target": "ldm.data.core.files.written_path", "params": {"text": "\\elsewhere"}}
    content["lightning"]["logger"] = {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"save_dir": text}}
    for name in ("train", "validation"):
        content["data"]["params"][name]["params"] |= {"num_samples": 4}
    config.write_text(yaml.safe_dump(content))
    assert "save_dir.target: ldm.data.core.files.written_path does not say" in planned("-r", str(run))


def test_no_function_of_ours_is_called_but_constructors_of_processes() -> None:
    with pytest.raises(UserError, match="does not say which class it makes"):
        find_target("ldm.data.core.optional.require")
    assert find_target("ldm.diffusion.discrete.DiscreteVP.cosine")
    made = {name for name, part in _targets().items() if not isinstance(part, type)}
    degradations = {f"ldm.data.image_pairs.degradation.bsrgan{kind}" for kind in ("", "_light")}
    assert {name.rpartition(".")[0] for name in made - degradations} == {"ldm.diffusion.discrete.DiscreteVP"}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_a_run_writes_into_its_own_folder(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(run_folder(tmp_path, "ldm.toy.shapes.Shapes"))
    config = run / "configs" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["lightning"] |= ELSEWHERE[key]
    content["data"]["params"]["train"]["params"] |= {"num_samples": 4}
    content["data"]["params"]["validation"]["params"] |= {"num_samples": 4}
    config.write_text(yaml.safe_dump(content))
    said = planned("-r", str(run))
    assert f"{key}: " in said and "--allow path:" in said
    assert planned("-r", str(run), "--allow", said.partition("--allow ")[2].split()[0]) == ""
    assert planned("--base", str(config)) == ""


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "x/${ oc.env : SECRET }/y", "${oc.env:SECRET,nothing}"])
def test_a_run_reads_no_variable_of_the_environment(text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "3")
    run = Path(run_folder(tmp_path, "ldm.toy.shapes.Shapes"))
    config = run / "configs" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    for name in ("train", "validation"):
        content["data"]["params"][name]["params"] |= {"num_samples": 4}
    content["data"]["params"]["train"]["params"]["fields"] = [text]
    config.write_text(yaml.safe_dump(content))
    assert "reads SECRET of the environment" in (said := planned("-r", str(run)))
    assert "--allow env:SECRET" in said
    for words in (["-r", str(run), "--allow", "env:SECRET"], ["--base", str(config)]):
        assert "environment" not in planned(*words)


@pytest.mark.parametrize(
    "text", ["${oc.env:SECRET,{}}", "${oc.${a}:SECRET}", "${oc.env:${a}}", "${oc.decode:'${a}'}", "${x"]
)
def test_nor_by_a_text_of_another_form(text: str) -> None:
    with pytest.raises(UserError, match="a: .*(interpolation|environment)"):
        resolve({"a": text})


def test_escaped_interpolations_are_texts() -> None:
    assert resolve({"a": "\\${oc.env:SECRET}", "b": "${a}"})["a"] == "${oc.env:SECRET}"


def test_what_a_program_allows_ends_with_it(module: str) -> None:
    main_guard(lambda argv: find_target(f"{allow(module)}.Items") and None)([])
    with pytest.raises(UserError, match=module):
        find_target(f"{module}.Items")


@pytest.mark.parametrize("package", ["nowhere_to_be_found", "a b", "", "..", "os;", "-"])
def test_only_packages_that_are_there_can_be_allowed(package: str) -> None:
    with pytest.raises(UserError, match="--allow"):
        allow(package)


def test_a_package_that_shadows_nothing_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the working folder with the name of a module of Python does not make that one trusted."""
    (tmp_path / "subprocess.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "subprocess" in planned("--base", write(tmp_path / "a.yaml", "subprocess.Popen"))


@pytest.mark.parametrize(
    ("written", "meant", "expected"),
    [
        ("unett", "unet", True), ("unt", "unet", True), ("uent", "unet", True), ("UNET", "unet", True),
        ("umet", "unet", True), ("unet", "unet", True), ("ddpm_edit", "ddpm", False), ("teun", "unet", False),
        ("LatentInpaintDiffusion", "LatentDiffusion", False), ("a", "", True), ("", "", True), ("nuet", "unte", False),
    ],
)  # fmt: skip
def test_slips(written: str, meant: str, expected: bool) -> None:
    assert is_slip(written, meant) is expected


def test_a_folder_of_a_tokenizer_runs_nothing(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: ...\n"
    (tmp_path / "evil.py").write_text(code)
    content = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError):
        HuggingFaceTokenizer(str(tmp_path))(["a"])
    assert not (tmp_path / "canary").exists()
