"""Train the feature network that ships with the project, on generated scenes; about five minutes on one CPU core.

    python scripts/train_scene_network.py

Prints how often the largest logit is a thing of the scene, on scenes that it has not seen.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ldm.cli.common import main_guard, progress
from ldm.data.core.loader import collate
from ldm.evaluation.extractors import SCENE_WEIGHTS
from ldm.toy.scene_network import SIDE, train_scene_network
from ldm.toy.shapes import Shapes

_log = logging.getLogger("ldm.scene_network")


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Train, judge and write the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--out", type=Path, default=SCENE_WEIGHTS)
    options = parser.parse_args(argv)
    network, losses = train_scene_network(options.steps, options.scenes)
    recent: list[float] = []
    with progress(options.steps, "training") as bar:
        for loss in losses:
            recent = [*recent[-99:], loss]
            bar.update()
    unseen = Shapes(1000, SIDE, (1, 3), split="validation", fields=("box_labels",))
    batch = collate([unseen[i] for i in range(len(unseen))])
    with torch.no_grad():
        guesses = network.eval()(batch["image"]).logits.argmax(1)
    right = (batch["box_labels"] == guesses[:, None]).any(1).float().mean()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Half precision: half the size, and the rounding is part of the definition of the features.
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, options.out)
    _log.info("loss %.3f; largest logit right for %.1f%% of unseen scenes; wrote %s",
              sum(recent) / len(recent), 100 * right, options.out)  # fmt: skip


if __name__ == "__main__":
    main()
