"""Train from the command line: python main.py --base A.yaml [B.yaml ...] -t [flags] [dotted.key=value ...]."""

from __future__ import annotations

import logging
import pdb
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn

from ldm.cli.arguments import Arguments, parse
from ldm.conditioning.text import TextConditioner
from ldm.conditioning.tokenizers import TrainedTokenizer
from ldm.config import instantiate
from ldm.doctor.data_fit import insist_on_fit
from ldm.errors import UserError
from ldm.models.loading import without_checkpoints
from ldm.training.cached_latents import CacheSettings, cached
from ldm.training.ema import ExponentialMovingAverage
from ldm.training.lightning_fixes.checkpoints import Stopped
from ldm.training.lightning_fixes.guard import StepGuard
from ldm.training.module import TrainingModule
from ldm.training.plan import Plan, make_plan, untrained_first_stage
from ldm.training.trainer import build_trainer

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake of the user is one line and status 1, anything else keeps its traceback."""
    _talk()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        plan = make_plan(arguments)
        if arguments.dry_run:
            dry_run(plan)
        elif arguments.train:
            train(plan, arguments)
        else:
            raise UserError("nothing to do: add -t to train, or --dry-run to see what would be trained")
    except UserError as error:
        _log.error("error: %s", error)
        return 1
    except (Stopped, SIGTERMException):  # the latter before the first step, when there is nothing new to save
        return 0
    return 0


def dry_run(plan: Plan) -> None:
    """Print the resolved config and what it amounts to. Needs neither data nor devices nor weights."""
    with torch.device("meta"):
        model = instantiate(plan.model, "model")
    sys.stdout.write(yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True))
    for line in describe(plan, model):
        sys.stdout.write(f"# {line}\n")
    if untrained_first_stage(plan) and not plan.model.get("allow_untrained_first_stage"):
        sys.stdout.write(f"# training would stop here: {_UNTRAINED}\n")


_UNTRAINED = (
    "model.params.autoencoder: the first stage has no trained weights; give it `checkpoint: PATH`, "
    "or set model.allow_untrained_first_stage=true"
)


def describe(plan: Plan, model: nn.Module) -> list[str]:
    """Say in a few lines what is trained, how fast and where."""
    lines = [f"model: {type(model).__name__}"]
    for name, part in model.named_children():
        total = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        if total:
            lines.append(f"  {name}: {total:,} parameters, {trained:,} trained")
        elif isinstance(part, ExponentialMovingAverage):
            lines.append(f"  {name}: {sum(b.numel() for b in part.buffers()):,} averages")
    devices, precision = plan.devices, plan.lightning["trainer"].get("precision", "32")
    return [
        *lines,
        f"learning rate: {plan.learning_rate:g}",
        f"global batch: {plan.batch}",
        f"devices: {devices.accelerator} {devices.devices}, strategy {plan.strategy}, precision {precision}",
        f"run folder: {plan.run.path}",
    ]


def train(plan: Plan, arguments: Arguments) -> None:
    """Build everything, then make the run folder, then train. Raises UserError before anything is written."""
    plan.check_machine()
    if untrained_first_stage(plan) and not plan.model.get("allow_untrained_first_stage"):
        raise UserError(_UNTRAINED)
    pl.seed_everything(plan.seed, workers=True, verbose=False)
    data = instantiate(plan.config["data"], "data")
    model = build_model(plan, data)
    insist_on_fit(model, data)
    if (settings := CacheSettings.of(plan.lightning.get("cache_latents"))) is not None:
        data = cached(data, model, settings, plan.devices)
    content = data.shape_summary()
    trainer = build_trainer(plan)
    is_first = rank_zero_only.rank == 0
    if is_first:
        plan.run.create(plan.config, plan.seed)
        save_tokenizers(model, plan)
    with plan.run.announced(), _also_written_to(plan.run.log if is_first else None):
        for line in [*describe(plan, model), *content]:
            _log.info(line)
        try:
            fit(trainer, model, data, plan, arguments)
        except UserError:
            if is_first:
                plan.run.discard()
            raise
        except (Stopped, SIGTERMException) as stop:
            _log.info("%s; go on with: main.py -t -r %s", str(stop) or "asked to stop before a step", plan.run.path)
            raise
        except Exception:
            _log.exception("training ended by an error")
            if arguments.debug and is_first:
                pdb.post_mortem()
            raise


def fit(trainer: pl.Trainer, model: TrainingModule, data: Any, plan: Plan, arguments: Arguments) -> None:
    """Train, and evaluate on the data set `test` if there is one."""
    train, validation = data.train_loader(plan.batch.accumulate), data.validation_loader()
    trainer.fit(model, train, validation, ckpt_path=plan.run.checkpoint, weights_only=True)
    if not arguments.no_test and data.test is not None:
        trainer.test(model, data.test_loader(), verbose=False)


def build_model(plan: Plan, data: Any) -> TrainingModule:
    """Build the model, ready to be trained on `data`: tokenizers fitted, memory format and compilation as asked."""
    # What a run goes on from holds all weights; those that it once started from need not be there any more.
    node = plan.model if plan.run.is_new else without_checkpoints(plan.model)
    model = instantiate(node, "model")
    if not isinstance(model, TrainingModule):
        raise UserError(f"model.target: {plan.model['target']} cannot be trained by itself")
    model.learning_rate, model.seed = plan.learning_rate, plan.seed
    if (limit := plan.lightning.get("max_skipped_steps")) is not None:
        model.guard = StepGuard(limit)
    if plan.run.is_new:
        fit_tokenizers(model, data)
    if plan.lightning.get("channels_last"):
        model.to(memory_format=torch.channels_last)
    if plan.lightning.get("compile"):
        for network in model.networks():
            network.compile()
    return model


def fit_tokenizers(model: nn.Module, data: Any) -> None:
    """Learn the vocabulary of tokenizers that have none yet from the captions of the training set."""
    for conditioner in _with_trained_tokenizer(model):
        if not conditioner.tokenizer.is_fitted:
            _log.info("learning a vocabulary from the captions of the training set")
            conditioner.tokenizer.fit(data.train_texts(conditioner.key))


def save_tokenizers(model: nn.Module, plan: Plan) -> None:
    """Write the vocabularies beside the config, for people; checkpoints hold them too."""
    for conditioner in _with_trained_tokenizer(model):
        conditioner.tokenizer.save(plan.run.path / "configs")


def _with_trained_tokenizer(model: nn.Module) -> list[TextConditioner]:
    found = [module for module in model.modules() if isinstance(module, TextConditioner)]
    return [module for module in found if isinstance(module.tokenizer, TrainedTokenizer)]


def _talk() -> None:
    """Send our messages to stderr, and keep quiet what only Lightning's authors want to say."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ldm").setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.WARNING)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


@contextmanager
def _also_written_to(path: Path | None) -> Iterator[None]:
    """Append all messages of a block to a file."""
    if path is None:
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
