"""LDMBertModel and CLIPTextModel <-> our text conditioners; their configs and files are those of transformers."""

from __future__ import annotations

from typing import Any

from ldm.bounds import Depth, Size
from ldm.compat.diffusers.rules import Component, Rename, Rule, Values, defaults_of, fixed, only, same
from ldm.errors import ConfigError

_LAYERS = "transformer.attn_layers.layers"


def _read_width(theirs: Values) -> Values:
    if theirs["encoder_ffn_dim"] != 4 * theirs["d_model"]:
        raise ConfigError(f"{theirs['encoder_ffn_dim']} is not 4 d_model, as our transformer has it", "encoder_ffn_dim")
    return {"dim": theirs["d_model"]}


def _of_tokenizer(name: str) -> Any:
    """Return how our parameter becomes a number, which may be left to the tokenizer."""

    def value(ours: Values) -> int:
        tokenizer = ours["tokenizer"]
        return ours[name] or (defaults_of(tokenizer["target"]) | (tokenizer.get("params") or {}))[name]

    return value


def _sized(theirs: str, default: int, ours: str) -> Rule:
    of_tokenizer = _of_tokenizer(ours)
    read, write = (lambda t: {ours: t[theirs]}), (lambda o: {theirs: of_tokenizer(o)})
    return Rule({theirs: (Size, default)}, (ours,), read, write)


def _bert_names(ours: Values, theirs: Values) -> list[Rename]:
    names = [
        Rename("transformer.token_emb", ("model.embed_tokens",)),
        Rename("transformer.pos_emb.emb", ("model.embed_positions",)),
        Rename("transformer.norm", ("model.layer_norm",)),
        Rename("transformer.to_logits", ("to_logits",)),
    ]
    for layer in range(ours["depth"]):
        attention, perceptron = f"{_LAYERS}.{2 * layer}", f"{_LAYERS}.{2 * layer + 1}"
        table = {
            f"{attention}.0": "self_attn_layer_norm",
            f"{attention}.1.to_out": "self_attn.out_proj",
            **{f"{attention}.1.to_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
            f"{perceptron}.0": "final_layer_norm",
            f"{perceptron}.1.net.0.0": "fc1",
            f"{perceptron}.1.net.2": "fc2",
        }
        names += [Rename(old, (f"model.layers.{layer}.{new}",)) for old, new in table.items()]
    return names


LDM_BERT = Component(
    "LDMBertModel",
    "ldm.conditioning.text.TextConditioner",
    (
        _sized("vocab_size", 30522, "vocab_size"),
        _sized("max_position_embeddings", 77, "max_length"),
        same("encoder_layers", Depth, 32, "depth"),
        Rule(
            {"d_model": (Size, 1280), "encoder_ffn_dim": (Size, 5120)},
            ("dim",),
            _read_width,
            lambda ours: {"d_model": ours["dim"], "encoder_ffn_dim": 4 * ours["dim"]},
        ),
        fixed("encoder_attention_heads", 8),
        fixed("head_dim", 64),
        fixed("activation_function", "gelu"),
        fixed("scale_embedding", False),
        Rule(write=lambda ours: {"architectures": ["LDMBertModel"], "model_type": "ldmbert", "pad_token_id": 0}),
    ),
    _bert_names,
    unused=("tokenizer", "key", "drop_rate", "embedding_dropout", "trainable", "embedding_std"),
    aliases={},
    weights="model",
    is_open=True,
)


def _clip(name: str, layers: tuple[str, ...], pooled: str | None) -> Component:
    """Return CLIP's text model, whose context comes from the first of some layers unless our config says otherwise."""

    def check(ours: Values) -> Values:
        if ours["layer"] not in layers:
            raise ConfigError(
                f"{ours['layer']!r} has no counterpart in this pipeline; only {' or '.join(layers)}", "layer"
            )
        return {}

    known = {} if layers[0] == "last" else {"layer": layers[0]}
    known |= {} if pooled is None else {"pooled": pooled}
    return Component(
        name,
        "ldm.conditioning.text.CLIPTextConditioner",
        (
            same("max_position_embeddings", Size, 77, "max_length"),
            Rule({}, ("layer",), lambda theirs: known, check),
            only("pooled", pooled, "the pipeline has its own vector"),
        ),
        lambda ours, theirs: [Rename(f"transformer.{part}", (part,)) for part in ("text_model", "text_projection")],
        unused=("version", "tokenizer", "key", "drop_rate", "trainable", "pad_id"),
        aliases={r"^(?!text_model\.|text_projection\.)": "text_model."},  # transformers 5 writes the names without it
        weights="model",
        is_open=True,
    )


CLIP_TEXT = _clip("CLIPTextModel", ("last", "penultimate"), None)
CLIP_HIDDEN = _clip("CLIPTextModel", ("hidden",), None)  # of Stable Diffusion XL
CLIP_PROJECTED = _clip("CLIPTextModelWithProjection", ("hidden",), "projected")
