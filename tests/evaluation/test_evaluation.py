"""Evaluations: the same result however they are cut, stopped or continued; references by content; conditions."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.data.readers.folders import ImageFolder
from ldm.errors import UserError
from ldm.evaluation.comparison import compare, read_result
from ldm.evaluation.conditions import BalancedClasses, DataConditions, Unconditional, UniformClasses
from ldm.evaluation.distribution_metrics import (
    Frechet,
    InceptionScore,
    Kernel,
    MemorisationFrechet,
    Mmd,
    PrecisionRecall,
    SpatialFrechet,
)
from ldm.evaluation.evaluate import Result, evaluate_images, evaluate_reconstructions, label
from ldm.evaluation.extractors import Features, weights_hash
from ldm.evaluation.image_metrics import FunctionMetric, Lpips, psnr, psnr_to_target, ssim_to_target
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.memorisation import nearest_neighbours
from ldm.evaluation.metric_suite import MetricSuite
from ldm.evaluation.references import ReferenceSet, data_reference, read_npz, write_npz
from ldm.toy.scene_extractor import SceneNet
from ldm.toy.shapes import Shapes

PSNR, SSIM = FunctionMetric(psnr_to_target), FunctionMetric(ssim_to_target)

pytest.importorskip("torch_fidelity")


def shapes(count, seed=0, **options):
    return ImageSet(Shapes(count, 32, seed=seed, **options), f"shapes {seed}")


@pytest.fixture(scope="module")
def extractor():
    return SceneNet()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, extractor):
    return data_reference(shapes(40, 1), extractor, tmp_path_factory.mktemp("cache"))


def without_time(result):
    content = result.content()
    del content["made"]
    return content


class Stops(Exception):
    """Stand for a machine that is taken away."""


def test_an_interrupted_evaluation_gives_the_same_result_and_repeats_nothing(tmp_path, extractor, reference):
    metrics = MetricSuite({"frechet": Frechet(), "inception_score": InceptionScore(2)}, extractor, keep=5)
    whole = evaluate_images(shapes(20), metrics, reference, tmp_path / "whole", batch_size=6)
    seen = []

    def until_the_second(count):
        seen.append(count)
        if len(seen) == 2:
            raise Stops

    with pytest.raises(Stops):
        evaluate_images(shapes(20), metrics, reference, tmp_path / "cut", 6, until_the_second)
    cut_off = tmp_path / "cut" / "parts" / "000001.safetensors"
    cut_off.write_bytes((tmp_path / "whole" / "parts" / "000001.safetensors").read_bytes()[:-50])
    again = []
    resumed = evaluate_images(shapes(20), metrics, reference, tmp_path / "cut", 9, again.append)
    assert again == [6, 6, 2]  # the first part is kept, with the size of parts of the beginning
    assert without_time(resumed) == without_time(whole)
    assert torch.equal(resumed.images, to_bytes(shapes(20).batch(range(5))["image"]))


def test_a_folder_of_another_evaluation_is_refused_and_left_alone(tmp_path, extractor, reference):
    metrics = MetricSuite({"frechet": Frechet()}, extractor)
    evaluate_images(shapes(8), metrics, reference, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds another evaluation, nothing was changed; it differs in n: 8, 9"):
        evaluate_images(shapes(9), metrics, reference, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_too_few_pictures_are_refused_before_any_is_read(tmp_path, extractor, reference):
    for metrics, given, message in (
        (
            MetricSuite({"kernel": Kernel(2, 30)}, extractor),
            reference,
            "kernel: needs 30 samples or more",
        ),
        (MetricSuite({"frechet": Frechet()}, extractor), None, "frechet: needs a reference"),
        (MetricSuite({"frechet": Frechet()}), reference, "frechet: is measured on features"),
        (MetricSuite(), reference, "no metrics"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_images(shapes(20), metrics, given, tmp_path)
    with pytest.raises(UserError, match="needs 50 images of reference or more, there are 40"):
        evaluate_images(shapes(60), MetricSuite({"kernel": Kernel(2, 50)}, extractor), reference, tmp_path)
    assert not list(tmp_path.iterdir())


class Latents(IterableDataset):
    def __iter__(self):
        yield {"latent": 0}


def test_mixed_sizes_are_named():
    dataset = [{"image": torch.zeros(3, 8, 8)}, {"image": torch.zeros(3, 8, 9)}]
    with pytest.raises(UserError, match=r"photos: images of several sizes \(3x8x8, 3x8x9\)"):
        ImageSet(dataset, "photos").batch(range(2))
    with pytest.raises(UserError, match="of several sizes"):
        ImageSet(dataset, "photos").batch([1])  # wherever the parts are cut
    for items in ([{"latent": 0}], Latents()):
        with pytest.raises(UserError, match="latents: items have no 'image', they have latent"):
            ImageSet(items, "latents").batch(range(1))
    with pytest.raises(UserError, match="photos: has no images"):
        ImageSet([], "photos")


def test_bytes_come_back_as_they_were():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(from_bytes(values)), values)


def test_references_are_kept_by_content_and_travel_as_npz(tmp_path, extractor):
    first = data_reference(shapes(20), extractor, tmp_path)
    asked = []
    again = data_reference(shapes(20), extractor, tmp_path, asked.append)
    assert not asked and again.provenance == first.provenance
    other = data_reference(shapes(20, 5), extractor, tmp_path)
    assert other.provenance["sha256"] != first.provenance["sha256"]
    write_npz(tmp_path / "reference.npz", first.statistics)
    imported = read_npz(tmp_path / "reference.npz")
    features = extractor(to_bytes(shapes(20, 7).batch(range(20))["image"]))
    assert Frechet()(features, imported.statistics) == Frechet()(features, first.statistics)
    assert imported.provenance["count"] == 20
    assert first.provenance["size"] == [32, 32]
    np.savez(tmp_path / "adm.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert read_npz(tmp_path / "adm.npz").statistics.count is None
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(UserError, match="do not fit together"):
        read_npz(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("no")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "array.npy"):
        with pytest.raises(UserError, match="is no .npz file"):
            read_npz(tmp_path / name)


class Halved(torch.nn.Module):
    """Lose half of the contrast."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def encode_mode(self, x):
        return x * self.factor

    def decode(self, z):
        return z


def test_reconstructions_have_mean_and_deviation_of_each_picture(tmp_path):
    metrics = MetricSuite(images={"psnr": PSNR, "ssim": SSIM})
    images = shapes(10)
    result = evaluate_reconstructions(Halved(), images, metrics, None, tmp_path, {"weights": "raw"}, batch_size=4)
    x = from_bytes(to_bytes(images.batch(range(10))["image"]))
    each = psnr(from_bytes(to_bytes(x / 2)), x)
    assert result.values["psnr"] == pytest.approx(each.mean().item(), abs=1e-4)
    assert result.values["psnr_std"] == pytest.approx(each.std(correction=0).item(), abs=1e-4)
    assert set(result.values) == {"psnr", "psnr_std", "ssim", "ssim_std"} and result.count == 10


def test_figures_of_other_pictures_are_neither_returned_nor_compared(tmp_path):
    metrics, provenance = MetricSuite(images={"psnr": PSNR}), {"weights": "raw"}
    first = evaluate_reconstructions(Halved(), shapes(6), metrics, None, tmp_path / "a", provenance)
    others = ImageSet(Shapes(6, 32, seed=9), "shapes 0")
    with pytest.raises(UserError, match="holds another evaluation.*data_sha256"):
        evaluate_reconstructions(Halved(), others, metrics, None, tmp_path / "a", provenance)
    second = evaluate_reconstructions(Halved(), others, metrics, None, tmp_path / "b", provenance)
    with pytest.raises(UserError, match="cannot be compared: data_sha256"):
        compare(first.content(), second.content())


def test_conditions_are_known_by_all_that_they_hold():
    items = [{"image": torch.zeros(3, 8, 8), "caption": text, "boxes": torch.zeros(1, 4)} for text in "ab"]
    first = DataConditions(ImageSet(items, "data"))
    again = DataConditions(ImageSet([dict(item) for item in items], "data"))
    assert first.sha256 == again.sha256
    for changed in ({"caption": "c"}, {"boxes": torch.ones(1, 4)}, {"image": torch.ones(3, 8, 8)}):
        other = DataConditions(ImageSet([items[0], {**items[1], **changed}], "data"))
        assert other.sha256 != first.sha256
    assert Unconditional().sha256 is None
    labels = [kind("class_label", (0, 1)).sha256 for kind in (BalancedClasses, UniformClasses)]
    assert labels[0] == labels[1] != BalancedClasses("class_label", (0, 2)).sha256
    made = {"kind": "samples", "n": 2, "values": {"psnr": 1.0}, "metrics": {"psnr": {}}, "conditions": "data (a)"}
    with pytest.raises(UserError, match="cannot be compared: conditions_sha256"):
        compare({**made, "conditions_sha256": "0"}, {**made, "conditions_sha256": "1"})


def test_reconstructions_that_are_no_numbers_are_refused(tmp_path):
    broken = Halved()
    broken.factor.data.fill_(float("nan"))
    with pytest.raises(UserError, match="reconstructions are not finite"):
        evaluate_reconstructions(broken, shapes(4), MetricSuite(images={"psnr": PSNR}), None, tmp_path, {})


class Bare(SceneNet):
    """Know neither classes nor places."""

    name = "bare"

    def __call__(self, images):
        return Features(super().__call__(images).pooled)


def test_what_extractor_or_reference_lack_is_told_before_anything_is_written(tmp_path, extractor, reference):
    every = {"frechet": Frechet(), "spatial_frechet": SpatialFrechet(), "inception_score": InceptionScore(2)}
    with pytest.raises(
        UserError, match="spatial_frechet: .* no spatial; .*inception_score: .* no logits; leave it out"
    ):
        evaluate_images(shapes(8), MetricSuite(every, Bare()), reference, tmp_path / "out")
    write_npz(tmp_path / "reference.npz", reference.statistics)
    imported = read_npz(tmp_path / "reference.npz")
    several = MetricSuite({"frechet": Frechet(), "precision_recall": PrecisionRecall()}, extractor)
    with pytest.raises(UserError, match="precision_recall: needs the features .* leave it out"):
        evaluate_images(shapes(8), several, imported, tmp_path / "out")
    with pytest.raises(UserError, match="was made by the extractor scenenet .*, not by bare"):
        evaluate_images(shapes(8), MetricSuite({"frechet": Frechet()}, Bare()), imported, tmp_path / "out")
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="made with another extractor, of 3 numbers an image; this one gives 64"):
        evaluate_images(shapes(8), several, read_npz(tmp_path / "narrow.npz"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_figures_of_sets_are_had_from_the_same_samples(tmp_path, extractor, reference):
    evaluate_images(shapes(8), MetricSuite({"frechet": Frechet()}, extractor), reference, tmp_path)
    read = []
    others = MetricSuite({"inception_score": InceptionScore(2)}, extractor)
    found = evaluate_images(shapes(8), others, None, tmp_path, 50, read.append)
    assert "inception_score[scenenet]" in found.values and not read
    assert set(found.content()["metrics"]) == {"inception_score"}


def test_figures_that_lack_something_of_the_batch_are_told_beforehand(tmp_path):
    with pytest.raises(UserError, match="psnr: needs 'image' .*caption"):
        evaluate_images(shapes(4), MetricSuite(images={"psnr": PSNR}), None, tmp_path)  # not with themselves
    with pytest.raises(UserError, match="clip_score: needs 'caption' .*image"):
        only = ImageSet([{"image": torch.zeros(3, 32, 32)}], "only images")
        metric = {"clip_score": FunctionMetric(lambda images, batch: batch["caption"])}
        evaluate_reconstructions(Halved(), only, MetricSuite(images=metric), None, tmp_path, {})
    for metric, message in (
        (lambda images: images, "wrong: cannot be called with images and their batch"),
        (lambda images, batch: images.mean(), "wrong: does not return one value for each image"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_images(shapes(4), MetricSuite(images={"wrong": FunctionMetric(metric)}), None, tmp_path)
    with pytest.raises(UserError, match="differ in size: 3x16x16 and 3x32x32"):
        PSNR(torch.zeros(1, 3, 16, 16), {"image": torch.zeros(1, 3, 32, 32)})
    assert not list(tmp_path.iterdir())


def test_unreadable_pictures_are_named_and_not_replaced(tmp_path):
    for name in ("0.png", "2.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    (tmp_path / "1.png").write_text("no picture")
    with pytest.raises(UserError, match="photos: 1.png: .*cannot be read; repair or remove it"):
        ImageSet(ImageFolder(tmp_path, size=16), "photos").digest()
    assert ImageSet(ImageFolder(tmp_path, size=16), "photos", replaces=True).digest()


class Stream(IterableDataset):
    def __iter__(self):
        yield {"image": from_bytes(torch.arange(12, dtype=torch.uint8).view(3, 2, 2))}
        yield {"image": torch.full((3, 2, 2), 0.123456)}


def test_streams_are_kept_as_bytes_where_nothing_is_lost():
    images = ImageSet(Stream(), "stream")
    assert images.dataset[0]["image"].dtype == torch.uint8
    for kept, read in zip(images.batch(range(2))["image"], Stream(), strict=True):
        assert torch.equal(kept, read["image"])


def test_the_sizes_are_recorded_and_a_difference_is_told(tmp_path, caplog, extractor, reference):
    metrics = MetricSuite({"frechet": Frechet()}, extractor)
    large = ImageSet(Shapes(8, 64), "large")
    with caplog.at_level(logging.WARNING):
        first = evaluate_images(large, metrics, reference, tmp_path / "a").content()
    assert "images of 64x64 are compared with a reference of 32x32" in caplog.text
    assert first["size"] == [64, 64] and first["reference"]["size"] == [32, 32]
    second = evaluate_images(shapes(8), metrics, reference, tmp_path / "b").content()
    with pytest.raises(UserError, match="size: "):
        compare(first, second)
    drawn = {**second, "kind": "samples", "pixels_from": "floats of the model, rounded"}
    assert any(line.startswith("pixels_from: bytes of the files") for line in compare(second, drawn).settings)


def test_damaged_settings_say_what_to_do(tmp_path, extractor, reference):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json: is damaged .*; remove .* to begin anew"):
        evaluate_images(shapes(4), MetricSuite({"frechet": Frechet()}, extractor), reference, tmp_path)


def test_psnr_is_that_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    torch.manual_seed(0)
    x, y = torch.rand(2, 4, 3, 16, 16) * 2 - 1
    theirs = [functional.peak_signal_noise_ratio(a, b, data_range=2.0) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(psnr(x, y), torch.stack(theirs))


def test_lpips_gives_one_distance_a_picture():
    metric = Lpips()
    metric.network.random_features = True  # the published weights are not in a test's reach
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert metric(x, {"image": x}).tolist() == [0, 0]
    assert (metric(x, {"image": x.flip(0)}) > 0).all()
    assert MetricSuite(images={"lpips": metric, "psnr": PSNR}).settings()["metrics"] == {
        "lpips": {"sha256": weights_hash(metric.network)}, "psnr": {}
    }  # fmt: skip
    with torch.no_grad():
        metric.network.lin0.model[1].weight += 1
    other = Lpips()
    other.network = metric.network
    assert other.settings() != metric.settings()


def test_only_inception_has_fid_and_only_fifty_thousand_fid_50k():
    assert label("frechet[inception]", 50_000) == "FID-50k"
    assert label("frechet[inception]", 49_999) == "FID of 49,999 samples"
    assert label("kernel_std[inception]", 1000) == "deviation of KID of 1,000 samples"
    assert label("frechet[inception]", 50_000, "reconstructions") == "rFID of 50,000 reconstructions"
    assert label("inception_score[inception]", 9, "reconstructions") == "R-IS of 9 reconstructions"
    assert label("mmd[clip]", 1000) == "CMMD of 1,000 samples" and "CMMD" not in label("mmd[inception]", 1000)
    assert label("memorisation_frechet[inception]", 9) == "MIFID of 9 samples"
    assert label("kernel[inception]", 50_000, is_usual=False).startswith("kernel[inception], 50,000 samples, other")
    settings = {"kind": "samples", "metrics": {"kernel": {"subsets": 9, "size": 1000}, "frechet": {}}}
    result = Result({"kernel_std[inception]": 0.0, "frechet[inception]": 0.0}, 9, settings, torch.zeros(0), {})
    assert ["other options" in text for text in result.labels().values()] == [True, False]
    for name in ("frechet[scenenet]", "frechet[inception-12345678]", "psnr"):
        assert "FID" not in label(name, 50_000) and "50k" not in label(name, 50_000)


def test_conditions_depend_on_the_position_alone():
    balanced = BalancedClasses("class_label", (0, 1, 2))
    assert balanced(range(2, 8))["class_label"].tolist() == [2, 0, 1, 2, 0, 1]
    uniform = UniformClasses("class_label", tuple(range(50)))
    assert uniform(range(10))["class_label"][4:].tolist() == uniform(range(4, 10))["class_label"].tolist()
    data = DataConditions(shapes(4))
    assert data([1, 5])["caption"][0] == data([1, 5])["caption"][1]  # it starts anew


def test_copies_of_the_training_set_are_found_out(extractor):
    train, held_out = shapes(30, 1), shapes(12, 2)
    copies = to_bytes(train.batch(range(12))["image"])
    found = nearest_neighbours(copies, train, held_out, extractor)
    assert torch.equal(found["pixels"].images, copies) and torch.equal(found["scenenet"].images, copies)
    assert found["pixels"].ratio < 0.01 and found["scenenet"].ratio < 0.01
    fresh = nearest_neighbours(to_bytes(shapes(12, 3).batch(range(12))["image"]), train, held_out, extractor)
    assert 0.6 < fresh["pixels"].ratio < 1.6 and 0.6 < fresh["scenenet"].ratio < 1.6


def test_a_comparison_refuses_what_was_measured_differently(tmp_path, extractor, reference):
    metrics = MetricSuite({"frechet": Frechet()}, extractor)
    first = evaluate_images(shapes(8), metrics, reference, tmp_path / "a").content()
    second = evaluate_images(shapes(8, 9), metrics, reference, tmp_path / "b").content()
    found = compare(first, second)
    assert set(found.values) == {"frechet[scenenet]"} and not found.alone
    assert [line.partition(":")[0] for line in found.settings] == ["images", "sha256"]
    moved = ReferenceSet(reference.statistics, {**reference.provenance, "source": "another path"})
    compare(first, evaluate_images(shapes(8, 9), metrics, moved, tmp_path / "c").content())
    for changed, message in (
        ({"n": 9}, "n: 8, 9"),
        ({"pixels": "truncated"}, "pixels: uint8"),
        ({"extractor": {**first["extractor"], "sha256": "0"}}, "extractor.sha256"),
        ({"reference": {**first["reference"], "sha256": "0"}}, "reference.sha256"),
        ({"values": {"psnr": 1.0}}, "no value in common"),
        ({"metrics": {"frechet": {"of": 2}}}, "metrics.frechet.of"),
    ):
        with pytest.raises(UserError, match=message):
            compare(first, {**second, **changed})
    made = {**first, "kind": "samples", "conditions": "data (a, 8 items)"}
    with pytest.raises(UserError, match="conditions: data, balanced"):
        compare(made, {**second, "kind": "samples", "conditions": "balanced"})
    with pytest.raises(UserError, match="kind: reconstructions, samples"):
        compare(made, {**second, "kind": "reconstructions"})


def test_results_have_intervals_and_equal_models_are_not_told_apart(tmp_path, extractor, reference):
    sets = {"frechet": Frechet(), "mmd": Mmd(), "kernel": Kernel(4, 30), "inception_score": InceptionScore(2)}
    metrics = MetricSuite(sets, extractor)
    noise = [{"image": x} for x in torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1]
    first, again, other = (
        evaluate_images(images, metrics, reference, tmp_path / str(number)).content()
        for number, images in enumerate((shapes(40), shapes(40, 9), ImageSet(noise, "noise")))
    )
    assert set(first["intervals"]) == {f"{name}[scenenet]" for name in sets}
    for name, entry in first["intervals"].items():
        assert entry["low"] < first["values"][name] < entry["high"], name
    assert json.loads(json.dumps(first)) == first
    same, far = compare(first, again).differences, compare(first, other).differences
    assert not any(same[name].is_distinguishable for name in same)
    for name in ("frechet[scenenet]", "mmd[scenenet]"):
        assert far[name].is_distinguishable, far[name]
    assert "distinguishable; about" in same["frechet[scenenet]"].verdict()


def test_memorisation_is_measured_against_the_training_images_alone(tmp_path, extractor, reference):
    metrics = MetricSuite({"memorisation_frechet": MemorisationFrechet(), "frechet": Frechet()}, extractor)
    held_out = ReferenceSet(reference.statistics, {**reference.provenance, "source": "data.params.validation"})
    with pytest.raises(UserError, match="memorisation_frechet: compares with the training images, not data.params.val"):
        evaluate_images(shapes(8), metrics, held_out, tmp_path)
    train = ReferenceSet(reference.statistics, {**reference.provenance, "source": "data.params.train"})
    copies, others = (evaluate_images(shapes(40, seed), metrics, train, tmp_path / str(seed)).values for seed in (1, 5))
    assert others["memorisation_frechet[scenenet]"] >= others["frechet[scenenet]"]
    assert copies["frechet[scenenet]"] < 1e-3  # of the very images


def test_a_full_disk_is_one_line(tmp_path, extractor, reference):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        evaluate_images(shapes(4), MetricSuite({"frechet": Frechet()}, extractor), reference, tmp_path / "file" / "out")


def test_results_and_folders_of_former_names_are_read(tmp_path, extractor, reference):
    metrics = MetricSuite({"frechet": Frechet()}, extractor)
    content = evaluate_images(shapes(8), metrics, reference, tmp_path).content()
    former = {"pictures" if key == "images" else key: value for key, value in content.items()} | {"kind": "pictures"}
    (tmp_path / "evaluation.json").write_text(json.dumps(former))
    assert read_result(tmp_path / "evaluation.json") == content
    settings = (tmp_path / "settings.json").read_text()
    former = settings.replace('"kind": "images"', '"kind": "pictures"').replace('"images": ', '"pictures": ')
    assert former.count("pictures") == 2
    (tmp_path / "settings.json").write_text(former)
    read = []
    evaluate_images(shapes(8), metrics, reference, tmp_path, 50, read.append)
    assert not read
