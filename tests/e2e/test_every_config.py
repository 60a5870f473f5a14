"""Every file below configs/: valid and complete at full size, and able to train and to draw with few channels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_configs import CONFIGS, FROM_FILES, draw, made_up_data, narrowing, pinned, plain, train

from ldm.cli.train import main
from ldm.config import instantiate, load
from ldm.data.core.loader import collate

FILES = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("_base", "ablation")]
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in FILES)
SHOWN_SIZE = re.compile(r"#   (\w+): ([\d,]+) parameters")
FIRST_STAGE = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
TRAINED_ELSEWHERE = {
    *(f"ldm/{name}.yaml" for name in FROM_FILES),
    *(f"demo/{name}_shapes.yaml" for name in ("autoencoder", "txt2img", "layout")),
}
OWN = sorted(Path(name).stem for name in NAMES if name.startswith("own/"))

# parameters of the U-Net and of the conditioner, as counted for the published models; inpainting's is the first stage
DIFFUSION_SIZES = {
    "ldm/celebahq.yaml": (274_056_163, 0),
    "ldm/ffhq.yaml": (274_056_163, 0),
    "ldm/lsun_bedrooms.yaml": (274_056_163, 0),
    "ldm/lsun_churches.yaml": (294_966_916, 0),
    "ldm/class2img_f4.yaml": (400_920_579, 512_512),
    "ldm/class2img_f8.yaml": (394_984_196, 512_000),
    "ldm/txt2img.yaml": (872_300_484, 581_994_042),
    "ldm/txt2img_256.yaml": (403_623_939, 186_154_682),
    "ldm/layout2img_openimages.yaml": (246_277_379, 58_858_496),
    "ldm/layout2img_coco.yaml": (312_241_540, 33_651_712),  # together the 345M of Table 15
    "ldm/semantic_synthesis_256.yaml": (215_229_315, 546),
    "ldm/semantic_synthesis_512.yaml": (215_229_315, 546),
    "ldm/superres_bicubic.yaml": (113_622_563, 0),
    "ldm/superres_bsr.yaml": (113_622_563, 0),
    "ldm/inpainting.yaml": (215_230_467, 55_322_782),
    "ldm/inpainting_big.yaml": (387_245_827, 53_219_486),
    "ldm/retrieval_768.yaml": (1_335_480_400, 0),
    "ldm/sit_s.yaml": (32_865_056, 0),
    "ldm/sit_b.yaml": (130_315_808, 0),
    "ldm/sit_l.yaml": (457_840_672, 0),
    "ldm/sit_xl.yaml": (674_834_720, 0),
    "ldm/dit_xl.yaml": (674_834_720, 0),
    "ldm/lightningdit_xl.yaml": (674_924_944, 0),  # the transformers: counted by hand from their layers
    "stability/sd1.yaml": (859_520_964, 123_060_480),
    "stability/sd15_inpainting.yaml": (859_535_364, 123_060_480),
    "stability/sd2.yaml": (865_910_724, 340_387_840),
    "stability/sd2_v.yaml": (865_910_724, 340_387_840),
    "stability/sdxl_base.yaml": (2_567_463_684, 123_060_480 + 694_659_840),
}
FIRST_STAGE_SIZES = {  # without loss
    "autoencoder/kl_f4.yaml": 55_312_063,
    "autoencoder/kl_f8.yaml": 83_653_863,
    "autoencoder/kl_f16.yaml": 69_610_963,
    "autoencoder/kl_f32.yaml": 103_880_131,
    "autoencoder/vq_f4.yaml": 55_322_782,
    "autoencoder/vq_f4_noattn.yaml": 53_219_486,
    "autoencoder/vq_f8.yaml": 67_717_295,
    "autoencoder/vq_f8_n256.yaml": 67_652_783,
    "autoencoder/vq_f16.yaml": 69_593_371,
    # Not released; counted by hand from the layers of their kind.
    "autoencoder/kl_f2.yaml": 13_314_465,
    "autoencoder/kl_f16_c8.yaml": 69_499_371,
    "autoencoder/kl_f32_c16.yaml": 103_197_139,
    "autoencoder/vq_f2.yaml": 13_313_937,
    "autoencoder/vq_f2_n64.yaml": 13_309_969,
    "autoencoder/vq_f4_n256.yaml": 55_298_974,
    "autoencoder/vq_f32.yaml": 103_384_755,
}


def kind(value: Any) -> Any:
    """Return a config without its numbers, which narrowing sets alike, and its data."""
    if not isinstance(value, dict):
        return value if isinstance(value, (str, bool, type(None))) else ()
    kinds = {key: kind(child) for key, child in value.items() if key not in ("data", "checkpoint")}
    return {key: child for key, child in kinds.items() if child not in ((), {})}


def representatives() -> list[Any]:
    """Return the names of all configs.

    Slow are those that differ from an earlier one in nothing but numbers; proofs those that other tests train: on
    files, on data of one's own, in the demo.
    """
    kinds: set[str] = set()
    names: list[Any] = []
    for name in NAMES:
        if name.startswith("stability/"):
            continue  # their text models are those of files: tests/compat/test_stable_diffusion.py
        text = json.dumps(kind(yaml.safe_load((CONFIGS / name).read_text())), sort_keys=True)
        if name.startswith("own/") or name in TRAINED_ELSEWHERE:
            names.append(pytest.param(name, marks=pytest.mark.proof))
        else:
            names.append(pytest.param(name, marks=pytest.mark.slow) if text in kinds else name)
        kinds.add(text)
    return names


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("stability/") else name for name in NAMES]
)
def test_dry_run_at_full_size(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base", str(CONFIGS / name), "--dry-run", "--accelerator", "cpu"]) == 0
    shown = dict(SHOWN_SIZE.findall(capsys.readouterr().out))
    sizes = {part: int(number.replace(",", "")) for part, number in shown.items()}
    assert sizes
    if name in DIFFUSION_SIZES:
        assert (sizes["model"], sizes.get("cond_stage_model", 0)) == DIFFUSION_SIZES[name]
    if name in FIRST_STAGE_SIZES:
        assert sum(sizes[part] for part in FIRST_STAGE if part in sizes) == FIRST_STAGE_SIZES[name]


def test_all_published_sizes_are_of_configs_that_exist() -> None:
    assert {*DIFFUSION_SIZES, *FIRST_STAGE_SIZES} <= {*NAMES}


@pytest.mark.parametrize("name", representatives())
def test_two_steps_and_one_sample_with_few_channels(name: str, tmp_path: Path) -> None:
    config = plain(CONFIGS / name)
    words, data = made_up_data(config)
    run = train(CONFIGS / name, tmp_path, [*narrowing(config), *pinned(CONFIGS / name), *words])
    items = collate([data[0], data[1]])
    picture = draw(run, items)
    assert picture.shape == items["image"].shape
    assert torch.isfinite(picture).all()


# ----------------------------------------------------------------------------------------- own data, by a path


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make grey pictures of 16 bits in two folders of classes, with captions, maps of three classes and small twins."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for number in range(12):
        stem = f"{'ab'[number % 2]}/{number:02}"
        pixels = rng.integers(0, 2**16, (40, 80), dtype=np.uint16)
        for kind, array in (
            ("pictures", pixels),
            ("maps", (pixels % 3).astype(np.uint8)),
            ("partners", (pixels // 256).astype(np.uint8)),
            ("small", (pixels[::4, ::4] // 256).astype(np.uint8)),
        ):
            path = folder / kind / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        (folder / "pictures" / f"{stem}.txt").write_text(f"noise number {number}")
    return folder


_TRAIN = "data.params.train.params"
_RESCALER = "model.params.conditioner.params"
CASES = {  # name of the config and folder of the partners: what is said beside the paths
    ("autoencoder", None): [],
    ("folder", None): [],
    ("classes", None): [],
    ("captions", None): [],
    ("finetune_captions", None): [],
    ("finetune_adapter", None): [],
    ("finetune_classes", None): [],
    ("finetune_decoder", None): [],
    ("masks", "maps"): [f"{_TRAIN}.mask_root={{partners}}"],
    ("pairs", "maps"): [f"{_TRAIN}.target_root={{partners}}", f"{_TRAIN}.num_classes=3", f"{_RESCALER}.in_channels=3"],
    ("pairs", "partners"): [f"{_TRAIN}.target_root={{partners}}", f"{_TRAIN}.target_channels=1"],
    ("pairs", "small"): [
        f"{_TRAIN}.target_root={{partners}}", f"{_TRAIN}.target_channels=1", f"{_TRAIN}.factor=4",
        f"{_RESCALER}.num_stages=1",
    ],
}  # fmt: skip


SLOW = ("finetune_captions", "finetune_classes")  # whose choices the other ones have, too
RELEASED = (*SLOW, "finetune_adapter")  # models of images in colour


@pytest.mark.parametrize(
    ("name", "partners"), [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] in SLOW)) for case in CASES]
)
def test_own_data_by_a_path(name: str, partners: str | None, own_data: Path, tmp_path: Path) -> None:
    """Grey pictures of 16 bits, wider than high: only paths and options on the command line."""
    config = CONFIGS / "own" / f"{name}.yaml"
    channels, height = (3, 64) if name in RELEASED else (1, 32)
    words = [f"{_TRAIN}.root={own_data / 'pictures'}", f"{_TRAIN}.channels={channels}"]
    words.append(f"{_TRAIN}.size=[{height},{2 * height}]")
    words += [word.format(partners=own_data / str(partners)) for word in CASES[name, partners]]
    run = train(config, tmp_path, [*words, f"{_TRAIN}.validation_share=0.3", *narrowing(plain(config))])
    data = instantiate(load(run / "configs" / "config.yaml").data, "data")
    items = next(iter(data.validation_loader()))
    assert items["image"].shape[1:] == (channels, height, 2 * height)
    assert draw(run, items).shape == items["image"].shape


def test_all_own_configs_are_tried() -> None:
    assert {name for name, _ in CASES} == {*OWN}


@pytest.mark.parametrize("flag", ["-t", "--dry-run"])
def test_a_misfit_of_network_and_condition_is_one_line_that_names_both(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIGS / "ldm" / "inpainting.yaml"
    words = [*narrowing(plain(config)), *made_up_data(plain(config))[0], "model.params.network.params.in_channels=6"]
    with pytest.raises(SystemExit) as ended:
        main(["--base", str(config), flag, "-l", str(tmp_path / "logs"), *words])
    assert ended.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "model: UNet: in_channels is 6" in message and "FirstStageConditioner concatenates 4" in message
    assert "set in_channels: 7" in message
    assert not (tmp_path / "logs").exists()
