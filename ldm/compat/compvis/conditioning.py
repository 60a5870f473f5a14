"""CompVis conditioning stages -> ours.

In the original one string, `conditioning_key`, says how any conditioning reaches the U-Net, and `cond_stage_key` what
is read from the batch; here each conditioner knows its own key and slot. Sizes that the original never needed, because
it had no "no condition", are read off the U-Net.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ldm.compat.compvis.first_stage import IDENTITY
from ldm.compat.compvis.params import Node, Params, Translate, apply, node, renaming, unavailable
from ldm.errors import ConfigError

_SLOTS = {"concat": "concat", "crossattn": "context", "adm": "vector", "hybrid": "hybrid"}
_MODULES = "ldm.modules.encoders.modules"
_HYBRID = "ldm.modules.diffusionmodules.util.HybridConditioner"
_FIRST_STAGE, _UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"
_BERT, _BERT_VOCABULARY = "bert-base-uncased", 30522
_IMAGENET_WITH_NULL = 1001  # classes of the published model whose last one, 1000, means "no class"
_LAYOUT_KEY = "coordinates_bbox"
_CLIP_TEXT, _CLIP_TOKENIZER = "ldm.conditioning.text.CLIPTextConditioner", "openai/clip-vit-large-patch14"
# Architectures of OpenCLIP, and the names of their weights for transformers; all have the tokens of CLIP.
_OPEN_CLIP = {
    "ViT-H-14": "laion/CLIP-ViT-H-14-laion2B-s32B-b79k",
    "ViT-bigG-14": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
_INPAINTING_KEYS = ["mask", "masked_image"]


@dataclass(frozen=True)
class Wiring:
    """What the model around a conditioning stage says about it; None where a stage is translated on its own."""

    key: str | None = None
    slot: str | None = None
    trainable: bool | None = None
    channels: int = 3  # of a picture that is concatenated
    context_dim: int | None = None
    num_classes: int | None = None
    path: str = ""  # of the model's parameters

    def params(self, *names: str) -> dict[str, Any]:
        """Return those of the named settings that are known."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def insist(self, p: Params, slot: str) -> None:
        """Refuse any other slot than the one that a stage can fill."""
        if self.slot not in (slot, None):
            needed = next(key for key, value in _SLOTS.items() if value == slot)
            raise ConfigError(f"{p.target} needs {needed}", f"{self.path}.conditioning_key")


Stage = Callable[[Params, Wiring], Node]


def conditioner(p: Params) -> Node | None:
    """Translate the conditioning of a LatentDiffusion; None if it has none."""
    stage, slot = p.take("cond_stage_config"), _slot(p)
    wiring = _wiring(p, slot)
    p.only("cond_stage_forward", None, "every conditioner here has one way to embed")
    if stage in (_FIRST_STAGE, _UNCONDITIONAL) and wiring.trainable:
        raise p.error("cond_stage_trainable", f"has to be false with cond_stage_config: {stage}")
    if stage == _UNCONDITIONAL:
        return None
    if stage == _FIRST_STAGE:
        return _by_first_stage(p, wiring)
    if not isinstance(stage, dict):
        raise p.error("cond_stage_config", f"{stage!r} is neither a node nor {_FIRST_STAGE} nor {_UNCONDITIONAL}")
    return _translate(p, stage, p.at("cond_stage_config"), wiring)


def inpainting_conditioner(p: Params) -> Node:
    """Translate the conditioning of a LatentInpaintDiffusion: a mask and the image around it beside the latent."""
    keys = list(p.take("concat_keys", _INPAINTING_KEYS))
    if keys != _INPAINTING_KEYS:
        raise p.error("concat_keys", f"{keys} is not supported; only {_INPAINTING_KEYS}, in this order")
    image_key = p.take("masked_image_key", "masked_image")
    concat = node(
        "ldm.conditioning.images.InpaintingConditioner", key=image_key, latent_scale=p.peek("scale_factor", 1.0)
    )
    if _slot(p, "hybrid") == "concat":
        p.drop("cond_stage_config", "cond_stage_key", "cond_stage_trainable", "cond_stage_forward")
        return concat
    wiring = _wiring(p, "context")
    p.only("cond_stage_forward", None, "every conditioner here has one way to embed")
    stage = _translate(p, p.take("cond_stage_config"), p.at("cond_stage_config"), wiring)
    return node("ldm.conditioning.base.JointConditioner", inpainting=concat, text=stage)


def _slot(p: Params, default: str | None = None) -> str:
    concatenated, key = p.take("concat_mode", True), p.take("conditioning_key", default)
    if key is None:
        return "concat" if concatenated else "context"
    if key not in _SLOTS:
        raise p.error("conditioning_key", f"{key!r} is unknown; choose one of {', '.join(_SLOTS)}")
    return _SLOTS[key]


def _wiring(p: Params, slot: str) -> Wiring:
    unet = p.peek("unet_config")
    unet_params = (unet.get("params") or {}) if isinstance(unet, dict) else {}
    return Wiring(
        key=p.take("cond_stage_key", "image"),
        slot=slot,
        trainable=p.take("cond_stage_trainable", False),
        channels=max(unet_params.get("in_channels", 0) - p.peek("channels", 3), 0) or 3,
        context_dim=unet_params.get("context_dim"),
        num_classes=unet_params.get("num_classes"),
        path=p.path,
    )


def _by_first_stage(p: Params, wiring: Wiring) -> Node:
    """Condition on a picture's latent and, if the U-Net has one channel more than that, on a mask after it."""
    if wiring.slot != "concat":
        raise p.error("conditioning_key", f"{_FIRST_STAGE} needs concat")
    first_stage = p.peek("first_stage_config")
    first_stage = first_stage if isinstance(first_stage, dict) else {}
    known = {"embed_dim": p.peek("channels", 3)} if first_stage.get("target") == IDENTITY else first_stage.get("params")
    latent_channels = (known or {}).get("embed_dim", wiring.channels)
    mask = {"mask_key": "mask"} if wiring.channels == latent_channels + 1 else {}
    return node("ldm.conditioning.images.FirstStageConditioner", key=wiring.key, **mask)


def _translate(p: Params, stage: Any, path: str, wiring: Wiring) -> Any:
    translate = STAGES.get(str(stage.get("target"))) if isinstance(stage, dict) else None
    if translate is None:
        return p.translate(stage, path)
    return apply(lambda inner: translate(inner, wiring), stage, path, p.translate)


def identity(p: Params, wiring: Wiring) -> Node:
    """Translate torch.nn.Identity: what the batch holds is the conditioning."""
    p.drop("unused_argument1", "unused_argument2")
    if wiring.slot == "concat":
        return node("ldm.conditioning.images.ImageConditioner", key=wiring.key, channels=wiring.channels)
    if wiring.slot == "context":
        return node("ldm.conditioning.text.EmbeddingConditioner", key=wiring.key, dim=wiring.context_dim or 1)
    if wiring.slot == "vector":
        known = wiring.params("key", "num_classes", "slot")
        return node("ldm.conditioning.labels.ClassConditioner", **known)
    parts = {name: identity(p, replace(wiring, key=key, slot=slot)) for name, key, slot in _HYBRID_PARTS}
    return node("ldm.conditioning.base.JointConditioner", **parts)


# name of the child, key in the batch, slot
_HYBRID_PARTS = (
    ("concat_conditioner", "c_concat", "concat"),
    ("crossattn_conditioner", "c_crossattn", "context"),
)


def hybrid(p: Params, wiring: Wiring) -> Node:
    """Translate HybridConditioner: two conditionings, one concatenated and one attended to."""
    wiring.insist(p, "hybrid")
    parts = {}
    for (name, key, slot), config in zip(_HYBRID_PARTS, ("c_concat_config", "c_crossattn_config"), strict=True):
        parts[name] = _translate(p, p.take(config), p.at(config), replace(wiring, key=key, slot=slot))
    return node("ldm.conditioning.base.JointConditioner", **parts)


def class_embedder(p: Params, wiring: Wiring) -> Node:
    """Translate ClassEmbedder, which picks its own key from the batch."""
    wiring.insist(p, "context")
    params = {"num_classes": p.take("n_classes", 1000), "embed_dim": p.take("embed_dim"), "key": p.take("key", "class")}
    if params["num_classes"] == _IMAGENET_WITH_NULL:
        params["null_label"] = _IMAGENET_WITH_NULL - 1
    return node("ldm.conditioning.labels.ClassConditioner", **params, **wiring.params("trainable"))


def bert_embedder(p: Params, wiring: Wiring) -> Node:
    """Translate BERTEmbedder: the paper's transformer over captions, or over ids that the data holds."""
    wiring.insist(p, "context")
    params = {"dim": p.take("n_embed"), "depth": p.take("n_layer"), **p.given("embedding_dropout")}
    vocab_size, max_length = p.take("vocab_size", _BERT_VOCABULARY), p.take("max_seq_len", 77)
    p.drop("device")
    params |= wiring.params("key", "trainable")
    if p.take("use_tokenizer", True):
        tokenizer = node(
            "ldm.conditioning.tokenizers.HuggingFaceTokenizer",
            name_or_path=_BERT,
            max_length=max_length,
            vocab_size=min(vocab_size, _BERT_VOCABULARY),
        )
        return node("ldm.conditioning.text.TextConditioner", tokenizer=tokenizer, vocab_size=vocab_size, **params)
    return _tokens(vocab_size, max_length, params)


def transformer_embedder(p: Params, wiring: Wiring) -> Node:
    """Translate TransformerEmbedder."""
    wiring.insist(p, "context")
    params = {"dim": p.take("n_embed"), "depth": p.take("n_layer"), **wiring.params("key", "trainable")}
    p.drop("device")
    return _tokens(p.take("vocab_size"), p.take("max_seq_len", 77), params)


def _tokens(vocab_size: int, max_length: int, params: dict[str, Any]) -> Node:
    if params.get("key") == _LAYOUT_KEY:
        params["null_tokens"] = [vocab_size - 1] * max_length  # the last token means "no object"
    params = {"vocab_size": vocab_size, "max_length": max_length, **params}
    return node("ldm.conditioning.text.TokenConditioner", **params)


def clip_text(p: Params, wiring: Wiring) -> Node:
    """Translate FrozenCLIPEmbedder (Hugging Face weights, all tokens)."""
    wiring.insist(p, "context")
    p.drop("device", "freeze")
    params = p.given("version", "max_length")
    layer, index = p.take("layer", "last"), p.take("layer_idx", None)
    if layer == "hidden" and index in (-2, *([11] if "version" not in params else [])):  # of the twelve published ones
        params["layer"] = "hidden"
    elif layer != "last":
        raise p.error("layer", f"{layer!r}, layer_idx {index} is not supported; only last, or hidden with layer_idx 11")
    if p.take("always_return_pooled", False):
        params["pooled"] = "token"
    return node(_CLIP_TEXT, **params, **wiring.params("key"))


def open_clip_text(p: Params, wiring: Wiring) -> Node:
    """Translate FrozenOpenCLIPEmbedder and its successor, which may also give a vector, and then no final norm."""
    wiring.insist(p, "context")
    p.drop("device", "freeze", "version")  # of the architecture's weights
    params = {"version": p.choose("arch", "ViT-H-14", _OPEN_CLIP), "tokenizer": _CLIP_TOKENIZER, "pad_id": 0}
    layer = p.choose("layer", "last", {name: name for name in ("last", "penultimate")})
    has_vector = p.take("always_return_pooled", False)
    has_norm = p.take("legacy", True)
    if has_vector or not has_norm:
        if layer == "last" or has_norm:
            raise p.error("layer", "without legacy (and with always_return_pooled) only penultimate is supported")
        layer = "hidden"
    params |= {"layer": layer} | ({"pooled": "projected"} if has_vector else {})
    return node(_CLIP_TEXT, **params, **p.given("max_length"), **wiring.params("key"))


def spatial_rescaler(p: Params, wiring: Wiring) -> Node:
    """Translate SpatialRescaler."""
    wiring.insist(p, "concat")
    params = p.given("n_stages>num_stages", "method", "multiplier", "in_channels", "out_channels", "bias")
    return node("ldm.conditioning.images.SpatialRescaler", **params, **wiring.params("key", "trainable"))


STAGES: dict[str, Stage] = {
    "torch.nn.Identity": identity,
    _HYBRID: hybrid,
    f"{_MODULES}.ClassEmbedder": class_embedder,
    f"{_MODULES}.BERTEmbedder": bert_embedder,
    f"{_MODULES}.TransformerEmbedder": transformer_embedder,
    f"{_MODULES}.FrozenCLIPEmbedder": clip_text,
    f"{_MODULES}.FrozenOpenCLIPEmbedder": open_clip_text,
    f"{_MODULES}.FrozenOpenCLIPEmbedder2": open_clip_text,
    f"{_MODULES}.SpatialRescaler": spatial_rescaler,
}

_PRECOMPUTE = "compute the embeddings beforehand, put them in the batch and use torch.nn.Identity as cond_stage_config"

TABLE: dict[str, Translate] = {
    **{target: partial(stage, wiring=Wiring()) for target, stage in STAGES.items() if target.startswith("ldm.")},
    f"{_MODULES}.BERTTokenizer": renaming(
        "ldm.conditioning.tokenizers.HuggingFaceTokenizer", "max_length", drop=("device", "vq_interface")
    ),
    f"{_MODULES}.FrozenCLIPTextEmbedder": unavailable(f"OpenAI's CLIP is no dependency; {_PRECOMPUTE}"),
    f"{_MODULES}.FrozenClipImageEmbedder": unavailable(f"OpenAI's CLIP is no dependency; {_PRECOMPUTE}"),
}
