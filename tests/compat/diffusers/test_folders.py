"""Folders of others: every trap of their configs is carried or refused by its field; what is missing is said."""

import json
import shutil
from itertools import islice
from pathlib import Path

import diffusers_models as models
import pytest
import tiny
import torch
import yaml
from breakage.foreign_folders import mutations
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm import compat, config
from ldm.cli import export
from ldm.compat.diffusers import read
from ldm.errors import UserError
from ldm.models import cards, saving
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import load_model
from ldm.weights import load as weights

SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vqvae/config.json"
WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """Give a folder of a tiny model without condition."""
    return models.folder_of(models.unconditional(), tmp_path_factory.mktemp("written") / "folder")[0]


@pytest.fixture
def folder(pipeline, tmp_path) -> Path:
    """Give a copy to damage."""
    return Path(shutil.copytree(pipeline, tmp_path / "folder"))


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as refused:
        call(*arguments)
    message = str(refused.value)
    assert len(message) <= 300 and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------ traps, refused

REFUSED = [
    (UNET, "norm_eps", 1e-6),
    (UNET, "flip_sin_to_cos", False),
    (UNET, "freq_shift", 1),
    (UNET, "downsample_padding", 0),
    (UNET, "norm_num_groups", 16),
    (UNET, "act_fn", "gelu"),
    (UNET, "center_input_sample", True),
    (UNET, "class_embed_type", "timestep"),
    (UNET, "time_embedding_type", "fourier"),
    (UNET, "add_attention", False),
    (UNET, "mid_block_type", None),
    (UNET, "downsample_type", "resnet"),
    (UNET, "down_block_types", ["DownBlock2D", "SkipDownBlock2D"]),
    (UNET, "up_block_types", ["UpBlock2D", "UpBlock2D"]),
    (UNET, "block_out_channels", [64, 96]),
    (UNET, "block_out_channels", "wide"),
    (UNET, "layers_per_block", [1, 2]),
    (UNET, "attention_head_dim", "many"),
    (UNET, "a_field_of_tomorrow", 3),
    (UNET, "_class_name", "UNet3DModel"),
    (VAE, "norm_type", "spatial"),
    (VAE, "lookup_from_codebook", True),
    (VAE, "mid_block_add_attention", False),
    (VAE, "up_block_types", ["UpDecoderBlock2D", "UpDecoderBlock2D"]),
    (SCHEDULER, "clip_sample", True),
    (SCHEDULER, "thresholding", True),
    (SCHEDULER, "prediction_type", "flow"),
    (SCHEDULER, "beta_schedule", "sigmoid"),
    (SCHEDULER, "timestep_spacing", "karras"),
    (SCHEDULER, "_class_name", "KarrasVeScheduler"),
    ("model_index.json", "_class_name", "FluxPipeline"),
    ("model_index.json", "image_encoder", ["transformers", "CLIPVisionModel"]),
]


@pytest.mark.parametrize(("file", "field", "value"), REFUSED, ids=[f"{field}={value}" for _, field, value in REFUSED])
def test_what_our_networks_do_not_have_is_refused_by_its_field(file, field, value, folder):
    models.edit(folder / file, lambda content: content.update({field: value}))
    message = refusal(read, folder / "model_index.json")
    assert file in message and field in message


def test_a_scheduler_that_says_nothing_clips(folder):
    models.edit(folder / SCHEDULER, lambda content: content.pop("clip_sample"))
    assert "clip_sample" in refusal(read, folder / "model_index.json")


def test_a_middle_attention_without_norm_is_refused(folder):
    fields = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None}
    models.edit(folder / UNET, lambda content: content.update(fields))
    assert "attn_norm_num_groups" in refusal(read, folder / "model_index.json")


# ------------------------------------------------------------------------------------------------------ traps, carried


def params_of(folder: Path) -> models.Config:
    return read(folder / "model_index.json").section["params"]


def test_without_a_scaling_factor_it_is_that_of_diffusers(folder, caplog):
    assert params_of(folder)["latent_scale"] == 0.7
    models.edit(folder / VAE, lambda content: content.pop("scaling_factor"))
    assert params_of(folder)["latent_scale"] == 0.18215
    assert "latent_scale=1.0" in caplog.text


@pytest.mark.parametrize(
    ("fields", "grid"),
    [
        ({"timestep_spacing": "leading"}, {"offset": 1, "end": "clean"}),
        ({"timestep_spacing": "leading", "set_alpha_to_one": False}, {"offset": 1, "end": "cleanest"}),
        ({"timestep_spacing": "trailing"}, {"end": "clean"}),
        ({"_class_name": "PNDMScheduler", "timestep_spacing": "leading", "set_alpha_to_one": None, "steps_offset": 1},
         {"offset": 1, "end": "cleanest"}),
    ],
    ids=["to clean data", "to the first step", "trailing", "pndm by default"],
)  # fmt: skip
def test_where_a_walk_ends_is_carried(fields, grid, folder):
    def change(content):
        content.update(fields)
        if content["set_alpha_to_one"] is None:
            del content["set_alpha_to_one"]

    models.edit(folder / SCHEDULER, change)
    assert params_of(folder)["process"]["params"]["grid"]["params"] == grid
    assert load_model(folder).model.process.grid is not None


SOLVERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
           "UniPCMultistepScheduler")  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("fields", "grid"),
    [
        ({}, ("Linspace", {"end": "clean"})),
        ({"timestep_spacing": "leading", "steps_offset": 1}, ("Leading", {"offset": 1, "end": "clean"})),
        ({"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}, ("Trailing", {"end": "cleanest"})),
        ({"use_karras_sigmas": True}, ("Karras", {"end": "clean"})),
    ],
)
def test_of_a_solver_the_process_and_the_grid_are_read(name, fields, grid, folder):
    """As Stable Diffusion XL comes, with what its config has left over from other schedulers."""
    left_over = {
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "sample_max_value": 1.0,
        "solver_order": 2,
        "interpolation_type": "linear",
        "algorithm_type": "dpmsolver++",
        "prediction_type": "v_prediction",
    }
    kept = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 50}
    (folder / SCHEDULER).write_text(json.dumps({"_class_name": name, **kept, **left_over, **fields}))
    params = params_of(folder)
    assert params["process"]["params"]["process"]["params"] == {"num_steps": 50, "start": 0.00085, "end": 0.012}
    assert params["prediction"]["target"].endswith("Velocity")
    found = params["process"]["params"]["grid"]
    assert (found["target"].rpartition(".")[2], found["params"]) == grid
    assert load_model(folder).model.process.grid is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [("thresholding", True), ("use_flow_sigmas", True), ("use_beta_sigmas", True), ("final_sigmas_type", "one")],
)
def test_what_changes_the_process_of_a_solver_is_refused(field, value, folder):
    (folder / SCHEDULER).write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", field: value}))
    assert field in refusal(read, folder / "model_index.json")


def test_given_betas_and_their_rescaling_are_carried(folder):
    betas = [0.01, 0.02, 0.5]
    models.edit(folder / SCHEDULER, lambda c: c.update(trained_betas=betas, rescale_betas_zero_snr=True,
                                                        prediction_type="v_prediction"))  # fmt: skip
    process = LatentDiffusion.from_pretrained(folder).process
    assert process.num_steps == 3
    assert process.tables["alphas_cumprod"][-1] == 0


def heads(kind: str, value, widths=(32, 64)) -> models.Config:
    """Return our parameters of heads for a value of attention_head_dim."""
    attended = ["AttnDownBlock2D", "AttnUpBlock2D"]
    if kind == "UNet2DConditionModel":
        attended = [f"Cross{name}" for name in attended]
    content = {"_class_name": kind, "attention_head_dim": value, "block_out_channels": list(widths),
               "down_block_types": attended[:1] * 2, "up_block_types": attended[1:] * 2}  # fmt: skip
    return content


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("UNet2DModel", 16, {"num_head_channels": 16}),
        ("UNet2DModel", None, {"num_heads": 1}),
        ("UNet2DConditionModel", 8, {"num_heads": 8}),
        ("UNet2DConditionModel", [2, 4], {"num_head_channels": 16}),
        ("UNet2DConditionModel", [4, 4], {"num_heads": 4}),
    ],
)
def test_attention_head_dim_means_a_width_or_a_number(kind, value, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(heads(kind, value)))
    params = read(tmp_path / "config.json").section["params"]
    assert {name: params[name] for name in ("num_heads", "num_head_channels") if name in params} == expected


def test_numbers_of_heads_without_a_rule_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(heads("UNet2DConditionModel", [2, 3])))
    assert "attention_head_dim" in refusal(read, tmp_path / "config.json")


def test_old_names_of_attention_and_linear_projections_are_read(tmp_path):
    """As SD 1 has its autoencoder, and SD 2 its U-Net."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    folder, built = models.folder_of(models.autoencoder(), tmp_path / "vae")
    state = load_file(folder / f"{WEIGHTS}.safetensors")
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    save_file(state, folder / f"{WEIGHTS}.safetensors")
    check_filled(folder, built)

    folder, built = models.folder_of(models.unet(context_dim=16, linear_projections=True), tmp_path / "unet")
    assert json.loads((folder / "config.json").read_text())["use_linear_projection"] is True
    assert load_file(folder / f"{WEIGHTS}.safetensors")["mid_block.attentions.0.proj_in.weight"].ndim == 2
    check_filled(folder, built)


def check_filled(folder: Path, built: torch.nn.Module) -> None:
    """Check that the weights of a component's folder are those of an object."""
    filled = config.instantiate({**read(folder / "config.json").section, "checkpoint": str(folder)}).state_dict()
    assert all(torch.equal(filled[name], value) for name, value in built.state_dict().items())


# ---------------------------------------------------------------------------------------------------- ours, not theirs

INEXPRESSIBLE = {
    "num_heads": models.unet(num_heads=2, attention_factors=[1]),
    "conv_resample": models.unet(conv_resample=False),
    "channel_mult": models.unet(channel_mult=[2, 4]),
    "dims": models.unet(dims=1),
    "vector_dim": models.unet(vector_dim=8),
    "codebook_size": models.unet(codebook_size=7),
    "embed_dim": {**models.autoencoder(), "params": {**models.autoencoder()["params"], "embed_dim": 3}},
    "attention": models.autoencoder(attention="linear"),
    "dropout": models.autoencoder(dropout=0.1),
    "resample_with_conv": models.autoencoder(resample_with_conv=False),
    "norm_groups": models.autoencoder(norm_groups=None),
    "regularizer": models.autoencoder("Identity"),
    "posterior_weight": models.unconditional(
        process=tiny.node("diffusion.discrete.DiscreteVP.linear", num_steps=9, posterior_weight=1.0)
    ),
    "process": models.unconditional(process=tiny.node("diffusion.rectified_flow.RectifiedFlow")),
    "autoencoder": models.model(models.unet(3), tiny.identity_config()),
    "latent_size": models.unconditional(latent_size=[8, 16]),
}


@pytest.mark.parametrize(("parameter", "section"), INEXPRESSIBLE.items(), ids=INEXPRESSIBLE)
def test_what_diffusers_cannot_express_is_refused_by_its_parameter(parameter, section, tmp_path):
    message = refusal(models.save_folder, tmp_path / "folder", torch.nn.Identity(), section)
    assert parameter in message.partition(": ")[0]
    assert not (tmp_path / "folder").exists()


# ------------------------------------------------------------------------------------------------------- whole folders


@pytest.mark.parametrize("missing", [UNET, SCHEDULER, "vqvae", f"unet/{WEIGHTS}.safetensors"])
def test_a_half_copied_folder_is_told(missing, folder):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refusal(LatentDiffusion.from_pretrained, folder)
    assert str(path if path.suffix == ".json" else folder / missing.partition("/")[0]) in message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_told(content, folder):
    (folder / UNET).write_bytes(content)
    assert str(folder / UNET) in refusal(LatentDiffusion.from_pretrained, folder)


def test_weights_of_another_config_are_told(folder):
    models.edit(folder / UNET, lambda content: content.update(layers_per_block=2))
    message = refusal(LatentDiffusion.from_pretrained, folder)
    assert str(folder) in message and "missing" in message


def same_weights(folder: Path, pipeline: Path) -> bool:
    one, other = weights.read(folder), weights.read(pipeline)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_shards_and_pickles_are_read(folder, pipeline):
    whole = folder / "unet" / f"{WEIGHTS}.safetensors"
    state, names = load_file(whole), {}
    for index, name in enumerate(sorted(state)):
        names[name] = f"{WEIGHTS}-0000{1 + index % 2}-of-00002.safetensors"
    for file in set(names.values()):
        save_file({name: state[name] for name in state if names[name] == file}, folder / "unet" / file)
    whole.unlink()
    (folder / "unet" / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    codes = folder / "vqvae" / f"{WEIGHTS}.safetensors"
    torch.save(load_file(codes), codes.with_suffix(".bin"))
    codes.unlink()
    assert same_weights(folder, pipeline)
    provenance = load_model(folder).provenance()
    assert provenance["checkpoint_sha256"] != load_model(pipeline).provenance()["checkpoint_sha256"]
    (folder / "unet" / next(iter(names.values()))).unlink()
    assert "of-00002" in refusal(LatentDiffusion.from_pretrained, folder)


def test_large_weights_are_written_in_shards(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "LARGEST_SHARD", 100_000)
    folder = LatentDiffusion.from_pretrained(pipeline).save_pretrained(tmp_path / "folder", format="diffusers")
    index = json.loads((folder / "unet" / f"{WEIGHTS}.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 1 and files[0] == f"{WEIGHTS}-00001-of-{len(files):05}.safetensors"
    states = [load_file(folder / "unet" / file) for file in files]
    assert all(sum(t.nbytes for t in state.values()) <= 100_000 or len(state) == 1 for state in states)
    assert index["metadata"]["total_size"] == sum(t.nbytes for state in states for t in state.values())
    assert same_weights(folder, pipeline)


class Program:
    """A pickle that would run."""

    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_that_runs_something_is_refused(folder, capsys):
    codes = folder / "vqvae" / f"{WEIGHTS}.safetensors"
    codes.unlink()
    torch.save({"weight": Program()}, codes.with_suffix(".bin"))
    assert f"{WEIGHTS}.bin" in refusal(LatentDiffusion.from_pretrained, folder)
    assert "ran" not in capsys.readouterr().out


def test_python_files_of_a_tokenizer_are_not_run(bert_folder, tmp_path, capsys):
    folder, _ = models.folder_of(models.with_bert(bert_folder), tmp_path / "folder")
    (folder / "tokenizer" / "own.py").write_text("print('ran')\nclass Own: pass\n")
    fields = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    models.edit(folder / "tokenizer" / "tokenizer_config.json", lambda content: content.update(fields))
    model = LatentDiffusion.from_pretrained(folder)
    assert "tokenizer" in refusal(model.sample, ["red"])
    assert "ran" not in capsys.readouterr().out


def test_parts_of_a_pipeline_fill_nodes(pipeline):
    params = params_of(pipeline)
    for name in ("network", "autoencoder"):
        built = config.instantiate({**params[name], "checkpoint": str(pipeline)})
        assert any(parameter.any() for parameter in built.parameters())
    training = tiny.node("training.latent_diffusion.DiffusionTraining")
    section = {"target": "ldm.models.latent_diffusion.LatentDiffusion", "params": params}
    training["params"]["model"] = section
    built = config.instantiate({**training, "checkpoint": str(pipeline)})
    loaded = LatentDiffusion.from_pretrained(pipeline)
    assert torch.equal(built.model.model.diffusion_model.out[2].weight, loaded.model.diffusion_model.out[2].weight)


@pytest.mark.parametrize("format", ["diffusers", "compvis", "safetensors"])
def test_export_writes_each_format(format, pipeline, tmp_path):
    out = tmp_path / "out"
    export.main(["--run", str(pipeline), "--out", str(out), "--format", format])
    written = {"diffusers": out, "compvis": out.with_suffix(".ckpt"), "safetensors": out.with_suffix(".safetensors")}
    assert same_weights(written[format], pipeline)
    if format != "compvis":
        assert LatentDiffusion.from_pretrained(written[format]).latent_scale.value == 0.7


def test_a_model_card_says_what_it_is_and_how_it_is_loaded(pipeline, tmp_path):
    run = Path(shutil.copytree(pipeline, tmp_path / "run"))
    provenance = load_model(run).provenance()
    measured = {"values": {"frechet[scenenet]": 1.25, "psnr": 3}, "labels": {"frechet[scenenet]": "Frechet (scenenet)"}}
    measured |= {"intervals": {"psnr": {"low": 2.5, "high": 3.5}}, "n": 10, "data_sha256": "ab12"}
    for name, sha256 in (("mine", provenance["checkpoint_sha256"]), ("older", "0" * 64)):
        (run / name).mkdir()
        (run / name / "evaluation.json").write_text(json.dumps({**measured, "checkpoint_sha256": sha256}))
    (run / "broken").mkdir()
    (run / "broken" / "evaluation.json").write_text("{")
    export.main(["--run", str(run), "--out", str(tmp_path / "out"), "--format", "diffusers"])
    card = (tmp_path / "out" / "README.md").read_text()
    front, text = card.split("---\n")[1:3]
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    for words in ("LDMPipeline.from_pretrained", "LatentDiffusion.from_pretrained", "mine/evaluation.json", "10 images",
                  "| Frechet (scenenet) | 1.25 |", "| psnr | 3, 2.5 to 3.5 |", "`ab12`", "scale: 0.7"):  # fmt: skip
        assert words in text
    assert "older" not in text and "broken" not in text


def test_exports_say_what_they_are_to_other_programs(pipeline, clip_folder, open_clip_folder, tmp_path):
    from safetensors import safe_open

    def texts(path: Path) -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return {key.removeprefix("modelspec."): value for key, value in file.metadata().items() if "." in key}

    export.main(["--run", str(pipeline), "--out", str(tmp_path / "tiny")])
    found = texts(tmp_path / "tiny.safetensors")
    assert (found["sai_model_spec"], found["title"], found["prediction_type"]) == ("1.0.0", "tiny", "epsilon")
    assert found["architecture"] == "latent-diffusion" and "resolution" not in found
    shipped = Path(__file__).resolve().parents[3] / "configs" / "stability"
    expected = {"sd1": ("v1", "512x512", "epsilon"), "sd15_inpainting": ("v1-inpainting", "512x512", "epsilon"),
                "sd2": ("v2-512", "512x512", "epsilon"), "sd2_v": ("v2-768-v", "768x768", "v"),
                "sdxl_base": ("xl-v1-base", "1024x1024", "epsilon")}  # fmt: skip
    for name, (architecture, resolution, prediction) in expected.items():
        section = compat.load(shipped / f"{name}.yaml", check=False)["model"]
        found = cards.modelspec(OmegaConf.to_container(section, resolve=False), name)
        assert found["modelspec.architecture"] == f"stable-diffusion-{architecture}"
        assert (found["modelspec.resolution"], found["modelspec.prediction_type"]) == (resolution, prediction)


def test_half_precision_is_written_and_nothing_is_overwritten(pipeline, tmp_path):
    out = tmp_path / "out"
    export.main(["--run", str(pipeline / "vqvae"), "--out", str(out), "--format", "diffusers", "--half"])
    assert all(tensor.dtype == torch.float16 for tensor in weights.read(out).values())
    model = LatentDiffusion.from_pretrained(pipeline)
    assert str(out) in refusal(model.save_pretrained, out, None, "diffusers")


def test_names_on_the_hub_are_looked_up_in_the_cache_alone(pipeline, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(LatentDiffusion.from_pretrained, "someone/a-model")
    assert "hf download someone/a-model" in message and "HF_HOME" in message
    repository, commit = tmp_path / "models--someone--a-model", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(pipeline, repository / "snapshots" / commit)
    assert LatentDiffusion.from_pretrained("someone/a-model").latent_scale.value == 0.7


def check_mutations(folder: Path, chosen) -> None:
    """Check that each folder is read, or refused in one line, within a moment; nothing else is raised."""
    for file, field, value in chosen:
        original = (folder / file).read_text()
        models.edit(folder / file, lambda content: content.update({field: value}))  # noqa: B023 - called at once
        try:
            LatentDiffusion.from_pretrained(folder)
        except UserError as error:
            assert len(str(error)) <= 300 and "\n" not in str(error), (file, field, value)
        finally:
            (folder / file).write_text(original)


def test_a_value_that_nobody_means_is_read_or_refused(folder):
    check_mutations(folder, islice(mutations(folder), 0, None, 101))


@pytest.mark.slow
def test_no_value_does_anything_but_load_or_be_refused(folder):
    check_mutations(folder, islice(mutations(folder), 3, None, 5))  # of 18 values a field
