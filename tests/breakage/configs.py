"""Configs of a stranger: nodes that would run code or write files, texts that would crash or fill memory.

Every node comes with what it would leave behind, a canary file, which must not be there after a door has seen it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Config = dict[str, Any]


def hostile_nodes(canary: Path, helper: Path) -> Iterator[Config]:
    """Yield nodes that would make the file `canary`; `helper` is a Python file that makes it when it is run."""
    file, command = str(canary), f"touch {canary}"
    words, code = ["touch", file], f"open({file!r}, 'w')"
    for target, params in (
        # Python's own
        ("os.system", {"command": command}),
        ("posix.system", {"command": command}),
        ("os.popen", {"cmd": command}),
        ("os.mkdir", {"path": file}),
        ("os.spawnlp", {"mode": 0, "file": "touch"}),
        ("subprocess.run", {"args": words}),
        ("subprocess.Popen", {"args": words}),
        ("subprocess.call", {"args": words}),
        ("subprocess.check_output", {"args": words}),
        ("subprocess.getoutput", {"cmd": command}),
        ("builtins.open", {"file": file, "mode": "w"}),
        ("io.open", {"file": file, "mode": "w"}),
        ("io.FileIO", {"file": file, "mode": "w"}),
        ("codecs.open", {"filename": file, "mode": "w"}),
        ("pathlib.Path.touch", {"self": file}),
        ("shutil.copy", {"src": str(helper), "dst": file}),
        ("shutil.copytree", {"src": str(helper.parent), "dst": file}),
        ("runpy.run_path", {"path_name": str(helper)}),
        ("timeit.timeit", {"stmt": code}),
        ("cProfile.run", {"statement": code}),
        ("pdb.run", {"statement": code}),
        ("logging.FileHandler", {"filename": file}),
        ("tempfile.mkdtemp", {"dir": str(canary.parent), "prefix": canary.name}),
        ("sqlite3.connect", {"database": file}),
        ("zipfile.ZipFile", {"file": file, "mode": "w"}),
        ("tarfile.open", {"name": file, "mode": "w"}),
        ("ctypes.CDLL", {"name": file}),
        ("importlib.import_module", {"name": helper.stem}),
        ("functools.partial", {"func": "os.system"}),
        # other packages
        ("torch.load", {"f": str(helper), "weights_only": False}),
        ("torch.save", {"obj": 1, "f": file}),
        ("torch.hub.load", {"repo_or_dir": str(helper.parent), "model": "x", "source": "local"}),
        ("torch.jit.load", {"f": str(helper)}),
        ("torch.utils.cpp_extension.load", {"name": "x", "sources": [str(helper)]}),
        ("torch.utils.data.DataLoader.check_worker_number_rationality", {}),
        ("numpy.save", {"file": file, "arr": [1]}),
        ("numpy.load", {"file": str(helper), "allow_pickle": True}),
        ("yaml.unsafe_load", {"stream": f"!!python/object/apply:os.system ['{command}']"}),
        ("omegaconf.OmegaConf.save", {"config": {}, "f": file}),
        ("pytorch_lightning.Trainer", {"default_root_dir": file}),
        ("pytorch_lightning.LightningModule.load_from_checkpoint", {"checkpoint_path": str(helper)}),
        ("torchvision.datasets.ImageFolder", {"root": str(helper.parent)}),
        ("transformers.AutoModel.from_pretrained", {"pretrained_model_name_or_path": "x", "trust_remote_code": True}),
        # by way of what is trusted
        ("torch.nn.modules.module.os.system", {"command": command}),
        ("torch.nn.utils.clip_grad_norm_", {"parameters": [], "max_norm": 1}),
        ("torch.optim.optimizer.torch.save", {"obj": 1, "f": file}),
        ("pytorch_lightning.callbacks.model_checkpoint.os.mkdir", {"path": file}),
        ("pytorch_lightning.callbacks.model_checkpoint.shutil.copy", {"src": str(helper), "dst": file}),
        ("pytorch_lightning.loggers.csv_logs.os.system", {"command": command}),
        ("ldm.ablation.runner.subprocess.run", {"args": words}),
        ("ldm.training.run_folder.os.system", {"command": command}),
        ("ldm.training.run_folder.shutil.copy", {"src": str(helper), "dst": file}),
        ("ldm.training.run.logging.FileHandler", {"filename": file}),
        ("ldm.training.callbacks.Path.touch", {"self": file}),
        ("ldm.training.callbacks.torch.save", {"obj": 1, "f": file}),
        ("ldm.training.autoencoder.AutoencoderTraining.load_from_checkpoint", {"checkpoint_path": str(helper)}),
        ("ldm.training.stages.train_stage", {"config": str(helper)}),
        ("ldm.training.run_folder.RunFolder.create", {"self": None}),
        ("ldm.config.targets.importlib.import_module", {"name": helper.stem}),
        ("ldm.weights.files.write", {"content": {}, "path": file}),
        ("ldm.cli.program.main", {"argv": ["export", "--out", file]}),
        ("ldm.__main__.main", {"argv": []}),
        ("ldm.networks.unet.UNet.__init__.__globals__.get", {"key": "torch"}),
        ("ldm.networks.unet.UNet.__subclasses__", {}),
        ("ldm.networks.unet.UNet.forward", {"self": None, "x": None, "t": None}),
        # classes of what is trusted that run what they read, or write where they are told
        ("torch.nn.ModuleList", {"modules": _unpickled(helper)}),
        ("torch.utils.data.ConcatDataset", {"datasets": _unpickled(helper)}),
        ("torch.nn.Sequential", {"args": _unpickled(helper)}),
        ("pytorch_lightning.callbacks.ModelCheckpoint", {"dirpath": file, "every_n_train_steps": 1}),
        ("pytorch_lightning.callbacks.OnExceptionCheckpoint", {"dirpath": file}),
        ("pytorch_lightning.profilers.SimpleProfiler", {"dirpath": file, "filename": "x"}),
        ("pytorch_lightning.loggers.CSVLogger", {"save_dir": file}),
        ("pytorch_lightning.loggers.TensorBoardLogger", {"save_dir": ".", "name": file}),
        ("ldm.training.callbacks.ImageLogger", {"directory": file, "every_n_steps": 1}),
        ("ldm.training.lightning_fixes.checkpoints.Checkpoints", {"directory": file, "every_n_steps": 1}),
        # functions of ours that import, read or make texts, also within what iterates
        ("ldm.data.core.optional.require", {"module": helper.stem, "purpose": "x"}),
        (
            "torch.nn.ModuleList",
            {
                "modules": {
                    "target": "ldm.data.core.optional.require",
                    "params": {"module": helper.stem, "purpose": "x"},
                }
            },
        ),
        ("torch.nn.ModuleList", {"modules": {"target": "ldm.data.core.module.iterate", "params": {"dataset": [1]}}}),
        ("ldm.data.core.files.written_path", {"text": file}),
        ("ldm.data.core.files.read_text", {"path": str(helper)}),
        ("ldm.models.latent_diffusion.LatentDiffusion.from_pretrained", {"path": str(helper.parent)}),
        # code that lies beside the config
        (f"{helper.stem}.Thing", {}),
        (f"{helper.stem}.make", {}),
    ):
        yield {"target": target, "params": params}


def _unpickled(helper: Path) -> Config:
    """Return a node that unpickles what lies beside the helper, once it is iterated."""
    pipes = "torch.utils.data.datapipes.iter"
    found = {
        "target": f"{pipes}.filelister.FileListerIterDataPipe",
        "params": {"root": str(helper.parent), "masks": "*.pickle"},
    }
    opened = {"target": f"{pipes}.fileopener.FileOpenerIterDataPipe", "params": {"datapipe": found, "mode": "b"}}
    return {"target": f"{pipes}.routeddecoder.RoutedDecoderIterDataPipe", "params": {"datapipe": opened}}


def _training(config: Config) -> Config:
    return config["training"]["params"]


PLACES: dict[str, Callable[[Config, Config], None]] = {
    "network": lambda config, node: config["model"]["params"].update(network=node),
    "process": lambda config, node: config["model"]["params"].update(process=node),
    "inside": lambda config, node: config["model"]["params"]["autoencoder"]["params"].update(regularizer=node),
    "model": lambda config, node: config.update(model=node),
    "in a list": lambda config, node: config["model"]["params"]["network"]["params"].update(channel_mult=[1, node]),
}
PLACES_OF_TRAINING: dict[str, Callable[[Config, Config], None]] = {
    "objective": lambda config, node: _training(config).update(objective=node),
    "training": lambda config, node: config.update(training=node | {"learning_rate": 1e-3}),
    "data": lambda config, node: config["data"]["params"].update(train=node),
    "data module": lambda config, node: config.update(data=node),
    "callback": lambda config, node: config["lightning"].update(callbacks={"x": node}),
    "checkpoints": lambda config, node: config["lightning"].update(modelcheckpoint=node),
    "logger": lambda config, node: config["lightning"].update(logger=node),
    "loggers": lambda config, node: config["lightning"].update(logger={"x": node}),
    "strategy": lambda config, node: config["lightning"]["trainer"].update(strategy=node),
    "plugins": lambda config, node: config["lightning"]["trainer"].update(plugins=[node]),
    "metric": lambda config, node: config["lightning"].update(callbacks={"x": _metric(node)}),
}


def _metric(node: Config) -> Config:
    """Return a callback that is to look a metric up by its name, which is a target."""
    options = ",".join(f"{key}={value}" for key, value in node["params"].items())
    spec = f"{node['target']}:{options}" if options else node["target"]
    params = {"metrics": [spec], "extractor": "scenenet"}
    return {"target": "ldm.training.sample_metrics.SampleMetrics", "params": params}


def placed(config: Config, place: str, node: Config) -> Config:
    """Return a config with a node at a place."""
    changed = copy.deepcopy(config)
    (PLACES | PLACES_OF_TRAINING)[place](changed, copy.deepcopy(node))
    return changed


def hostile_texts(section: str = "model") -> dict[str, str]:
    """Return YAML texts that must be refused, by what is wrong with them."""
    doubling = "\n".join(f"  a{i}: '${{x.a{i - 1}}}${{x.a{i - 1}}}'" for i in range(1, 40))
    lists = "\n".join(f"  a{i}: ['${{x.a{i - 1}}}', '${{x.a{i - 1}}}']" for i in range(1, 40))
    chain = "\n".join(f"  a{i}: '${{x.a{i - 1}}}'" for i in range(1, 400))
    laughs = "\n".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))
    return {
        "nothing": "",
        "a list": "- 1\n- 2",
        "a word": section,
        "a number": "3",
        "null": "null",
        "half": f"{section}: [1",
        "tabs": f"{section}:\n\ttarget: x",
        "not text": "\x00\x01",
        "nested a little": f"{section}: " + "[" * 60 + "]" * 60,
        "nested": f"{section}: " + "[" * 3_000 + "]" * 3_000,
        "nested until C crashes": f"{section}: " + "{a: " * 100_000,
        "nested by dashes": f"{section}:\n " + "- " * 3_000 + "1",
        "unclosed": "[" * 200_000,
        "a huge integer": f"{section}: {'9' * 100_000}",
        "a huge hexadecimal": f"{section}: 0x{'f' * 100_000}",
        "an integer of 65 bits": f"{section}: {{target: torch.nn.Flatten, params: {{start_dim: {2**64}}}}}",
        "a sexagesimal": f"{section}: {'1:' * 3_000}1",
        "doubling strings": f"x:\n  a0: b\n{doubling}",
        "doubling lists": f"x:\n  a0: [1]\n{lists}",
        "doubling nothing": f"x:\n  a0: ''\n{doubling}",
        "a long chain": f"x:\n  a0: b\n{chain}",
        "a circle": "x: {a: '${x.b}', b: '${x.a}'}",
        "itself": "x: {a: '${x}'}",
        "leads nowhere": "x: {a: '${nowhere}'}",
        "within another": "x: {a: b, b: '${x.${x.a}}'}",
        "a resolver": "x: {a: '${oc.decode:\"[1]\"}'}",
        "another resolver": "x: {a: '${oc.create:{a:1}}'}",
        "many laughs": f"x:\n  a0: &a0 [1, 2]\n{laughs}",
        "recursive alias": f"{section}: &a [*a]",
        "a tag": f"{section}: !!python/object/apply:os.system ['true']",
        "a set": f"{section}: !!set {{a}}",
        "binary": f"{section}: !!binary aGVsbG8=",
        "twice the same key": f"{section}: {{target: a.b}}\n{section}: {{target: c.d}}",
        "a key that is a list": "? [1, 2]\n: 3",
        "a key that is null": "{null: 1}",
        "a key of a million letters": f"{'k' * 300_000}: 1",
        "control characters": '"\\e[31mred\\nline": 1',
        "a large file": f"{section}: '{'x' * 1_000_001}'",
        "a large list": f"{section}: [{'1, ' * 200_000}1]",
        "number as a section": f"{section}: 3",
        "number as target": f"{section}: {{target: 3}}",
        "list as target": f"{section}: {{target: [os, system]}}",
        "target with blanks": f"{section}: {{target: 'os. system'}}",
        "target in other letters": f"{section}: {{target: 'ｏｓ.system'}}",
        "parameter that is a number": f"{section}: {{target: torch.nn.Identity, params: {{3: 4}}}}",
        "params that are a list": f"{section}: {{target: torch.nn.Identity, params: [1]}}",
        "base that is a number": "base: 3",
        "base that is itself": "base: config.yaml",
        "base that is a folder": "base: .",
        "base that is a device": "base: /dev/zero",
    }
