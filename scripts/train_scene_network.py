"""Train the feature network that ships with the project, on generated scenes; about five minutes on one CPU core.

Logs for how many unseen scenes the largest logit is a thing of the scene.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.entry import main_guard
from ldm.cli.options import progress
from ldm.toy.scene_extractor import SCENE_WEIGHTS, save_weights
from ldm.toy.scene_network import accuracy, train_scene_network

_log = logging.getLogger("ldm.scene_network")


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Train, check and write the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--out", type=Path, default=SCENE_WEIGHTS)
    given = parser.parse_args(argv)
    network, losses = train_scene_network(given.steps, given.scenes)
    recent: list[float] = []
    with progress(given.steps, "training") as bar:
        for loss in losses:
            recent = [*recent[-99:], loss]
            bar.update()
    save_weights(network, given.out)
    _log.info("loss %.3f; largest logit right for %.1f%% of unseen scenes; wrote %s",
              sum(recent) / len(recent), 100 * accuracy(network), given.out)  # fmt: skip


if __name__ == "__main__":
    main()
