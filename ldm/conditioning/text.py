"""Text as a condition: the paper's trainable transformer over tokens (appendix E.2.1), and a frozen CLIP text model.

Legend: B batch, L = max_length tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.bounds import Depth, Fraction, Natural, NonNegative, Size
from ldm.conditioning.base import Conditioner, Conditioning, Slot
from ldm.conditioning.tokenizers import HuggingFaceTokenizer, Tokenizer, TrainedTokenizer, load_pretrained
from ldm.errors import UserError
from ldm.networks.transformer import TransformerEncoder
from ldm.transfer import sent

__all__ = [
    "CLIPTextConditioner",
    "EmbeddingConditioner",
    "HuggingFaceTokenizer",
    "TextConditioner",
    "TokenConditioner",
    "TrainedTokenizer",
]


def text_keys(conditioners: Iterable[Conditioner]) -> list[str]:
    """Return the keys of batches under which conditioners read texts, perhaps none."""
    kinds = (TextConditioner, CLIPTextConditioner)
    return list(dict.fromkeys(part.key for part in conditioners if isinstance(part, kinds)))


class TokenConditioner(Conditioner):
    """Encode token ids (B, L) by a transformer: context (B, L, D).

    null_tokens: the ids of 'no condition', padded with 0 to max_length; None: all 0.
    """

    def __init__(
        self,
        vocab_size: Size,
        max_length: Size,
        dim: Size,
        depth: Depth,
        key: str = "tokens",
        drop_rate: Fraction = 0.0,
        null_tokens: Sequence[Natural] | None = None,
        embedding_dropout: Fraction = 0.0,
        trainable: bool = True,
    ) -> None:
        super().__init__(key, "context", drop_rate, trainable)
        self.width = dim
        null_ids = list(null_tokens or [])
        if len(null_ids) > max_length or any(not 0 <= token < vocab_size for token in null_ids):
            raise UserError(
                f"TokenConditioner: null_tokens must be at most {max_length} ids from 0 to {vocab_size - 1}"
            )
        self.null_ids = null_ids + [0] * (max_length - len(null_ids))
        self.transformer = TransformerEncoder(vocab_size, max_length, dim, depth, embedding_dropout=embedding_dropout)
        self._freeze_unless_trainable()

    def embed(self, value: Tensor) -> Tensor:
        """Return encoded ids (B, L): (B, L, D)."""
        return self.transformer(sent(value, self.device).long())

    def null(self, n: int) -> Tensor:
        """Return the null tokens, encoded once: (n, max_length, D)."""
        return self.embed(torch.tensor([self.null_ids])).expand(n, -1, -1)

    def embed_dropped(self, value: Tensor, drop: Tensor) -> Tensor:
        """Return encoded ids, the null tokens for the dropped samples."""
        ids = sent(value, self.device).long()
        null_ids = sent(torch.tensor(self.null_ids[: ids.shape[1]]), self.device)
        return self.embed(torch.where(sent(drop, self.device)[:, None], null_ids, ids))


class TextConditioner(Conditioner):
    """Encode texts by a trainable transformer: context (B, L, D). 'No condition' is the empty text.

    A batch has texts (list of str), or ids (B, L) already made by the tokenizer. max_length and vocab_size are the
    tokenizer's unless given; embedding_std: see TransformerEncoder.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dim: Size,
        depth: Depth,
        max_length: Size | None = None,
        key: str = "caption",
        drop_rate: Fraction = 0.0,
        embedding_dropout: Fraction = 0.0,
        vocab_size: Size | None = None,
        trainable: bool = True,
        embedding_std: NonNegative = 0.02,
    ) -> None:
        super().__init__(key, "context", drop_rate, trainable)
        max_length, vocab_size = max_length or tokenizer.max_length, vocab_size or tokenizer.vocab_size
        if max_length < tokenizer.max_length or vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"TextConditioner: max_length={max_length}, vocab_size={vocab_size} are less than the tokenizer's "
                f"{tokenizer.max_length} and {tokenizer.vocab_size}; leave them out to use those"
            )
        self.tokenizer, self.width = tokenizer, dim
        self.transformer = TransformerEncoder(
            vocab_size, max_length, dim, depth, embedding_dropout=embedding_dropout, embedding_std=embedding_std
        )
        self._freeze_unless_trainable()

    def embed(self, value: Sequence[str] | Tensor) -> Tensor:
        """Return B encoded texts or ids (B, L): (B, L, D)."""
        return self.transformer(sent(_ids(self.tokenizer, value), self.device))

    def null(self, n: int) -> Tensor:
        """Return the empty text, encoded once: (n, L, D)."""
        return self.embed([""]).expand(n, -1, -1)

    def embed_dropped(self, value: Sequence[str] | Tensor, drop: Tensor) -> Tensor:
        """Return encoded texts, the empty text for the dropped samples."""
        return self.embed(_without(self.tokenizer, value, drop))


class CLIPTextConditioner(Conditioner):
    """Encode texts by CLIP's text model: context (B, 77, D) and, with `pooled`, a vector (B, D). 'No condition' is "".

    Weights come from a loaded state dict (keys transformer.text_model.*), else from `version` at the first use;
    UserError if in neither. Nothing is downloaded.

    Args:
        version: A local folder, or a name in the Hugging Face cache.
        tokenizer: The same for the tokenizer, if it is elsewhere.
        pad_id: The token that fills up texts, if not the tokenizer's own (OpenCLIP: 0).
        layer: Which layer the context comes from: the last, or the one before it, both through the final norm, or
            "hidden", the one before the last without it (Stable Diffusion 1; 2; XL).
        pooled: The vector: the last layer at the end of the text, as it is ("token") or "projected".
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        max_length: Size = 77,
        key: str = "caption",
        drop_rate: Fraction = 0.0,
        trainable: bool = False,
        tokenizer: str | None = None,
        pad_id: Natural | None = None,
        layer: Literal["last", "penultimate", "hidden"] = "last",
        pooled: Literal["token", "projected"] | None = None,
    ) -> None:
        super().__init__(key, "context", drop_rate, trainable)
        if pooled is not None and layer == "penultimate":
            raise UserError("CLIPTextConditioner: pooled needs the last layer, which layer: penultimate leaves out")
        self.version, self.layer, self.pooled = version, layer, pooled
        self.transformer = _clip_skeleton(version, layer == "penultimate", pooled == "projected")
        vocab_size, self.width = self.transformer.text_model.embeddings.token_embedding.weight.shape
        self.tokenizer = HuggingFaceTokenizer(tokenizer or version, max_length, vocab_size, pad_id)
        self._has_weights = False
        self.register_load_state_dict_pre_hook(_accept_clip_weights)
        self._freeze_unless_trainable()

    def embed(self, value: Sequence[str] | Tensor) -> Tensor:
        """Return B encoded texts or ids (B, L): (B, L, D), with `pooled` (B, L + 1, D)."""
        self.load_weights()
        ids = sent(_ids(self.tokenizer, value), self.device)
        output = self.transformer.text_model(input_ids=ids, output_hidden_states=self.layer == "hidden")
        context = output.hidden_states[-2] if self.layer == "hidden" else output.last_hidden_state
        if self.pooled is None:
            return context
        vector = output.pooler_output
        if self.pooled == "projected":
            vector = self.transformer.text_projection(vector)
        return torch.cat([context, vector[:, None]], dim=1)

    def fill(self, embedding: Tensor) -> Conditioning:
        """Return the context and, with `pooled`, the last row of the embedding as the vector."""
        if self.pooled is None:
            return super().fill(embedding)
        return Conditioning(context=embedding[:, :-1], vector=embedding[:, -1])

    def widths(self) -> dict[Slot, int | None]:
        """Return D for the context and, with `pooled`, for the vector."""
        return {"context": self.width} | ({} if self.pooled is None else {"vector": self.width})

    def null(self, n: int) -> Tensor:
        """Return the empty text, encoded once: (n, L, D)."""
        return self.embed([""]).expand(n, -1, -1)

    def embed_dropped(self, value: Sequence[str] | Tensor, drop: Tensor) -> Tensor:
        """Return encoded texts, the empty text for the dropped samples."""
        return self.embed(_without(self.tokenizer, value, drop))

    def load_weights(self) -> None:
        """Read the published weights unless a state dict has been loaded."""
        if not self._has_weights:
            kind = "CLIPTextModelWithProjection" if self.pooled == "projected" else "CLIPTextModel"
            published = load_pretrained(kind, self.version, "text model")
            state = {f"text_model.{name}": tensor for name, tensor in _text_model(published).state_dict().items()}
            state |= {name: tensor for name, tensor in published.state_dict().items() if "projection" in name}
            self.transformer.load_state_dict({name: state[name] for name in self.transformer.state_dict()})
            self._has_weights = True


class EmbeddingConditioner(Conditioner):
    """Use embeddings from the batch as they are: (B, L, D), or (B, D) as one token.

    Retrieval-augmented models are conditioned on CLIP embeddings of L2 norm 1 in this way. 'No condition' is zeros of
    shape (num_tokens, dim).
    """

    def __init__(self, key: str, dim: Size, num_tokens: Size = 1, drop_rate: Fraction = 0.0) -> None:
        super().__init__(key, "context", drop_rate, trainable=False)
        self.width = self.dim = dim
        self.num_tokens = num_tokens

    def embed(self, value: Tensor) -> Tensor:
        """Return the embeddings with a token axis, on the device of this module."""
        return sent(value, self.device).reshape(len(value), -1, value.shape[-1])

    def null(self, n: int) -> Tensor:
        """Return zeros (n, num_tokens, dim)."""
        return self._device_buffer.new_zeros(n, self.num_tokens, self.dim)


def _ids(tokenizer: Tokenizer, value: Sequence[str] | Tensor) -> Tensor:
    return value.long() if isinstance(value, Tensor) else tokenizer(list(value))


def _without(tokenizer: Tokenizer, value: Sequence[str] | Tensor, drop: Tensor) -> Sequence[str] | Tensor:
    """Return the texts or ids, the empty text for the dropped samples."""
    if isinstance(value, Tensor):
        return torch.where(drop.to(value.device)[:, None], tokenizer([""]).to(value), value)
    return ["" if dropped else text for text, dropped in zip(value, drop.tolist(), strict=True)]


# Shapes of the published models, known offline: width, heads, layers, activation.
_CLIP_SHAPES = {
    "openai/clip-vit-large-patch14": (768, 12, 12, "quick_gelu"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79k": (1024, 16, 24, "gelu"),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": (1280, 20, 32, "gelu"),
}


def _clip_skeleton(version: str, without_last: bool, projects: bool) -> nn.Module:
    """Build CLIP's text model without its weights, as text_model, and if it `projects` its output, text_projection."""
    import transformers  # heavy: only when this conditioner is used

    if version in _CLIP_SHAPES:
        width, heads, layers, activation = _CLIP_SHAPES[version]
        config = transformers.CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, num_hidden_layers=layers,
            hidden_act=activation, projection_dim=width,
        )  # fmt: skip
    else:
        config = load_pretrained("CLIPTextConfig", version, "text model")
    config.num_hidden_layers -= without_last
    parts = {"text_model": _text_model(transformers.CLIPTextModel(config))}
    if projects:
        if config.projection_dim != config.hidden_size:
            sizes = f"{config.projection_dim} and {config.hidden_size}"
            raise UserError(
                f"CLIPTextConditioner: {version} has projection_dim and hidden_size {sizes}; equal ones only"
            )
        parts["text_projection"] = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
    return nn.ModuleDict(parts)


def _text_model(model: Any) -> nn.Module:
    """Return the part that is published as text_model: older transformers wrap it once more."""
    return dict(model.named_children()).get("text_model", model)


def _accept_clip_weights(module: CLIPTextConditioner, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Remember that weights are loaded, and drop the constant that old checkpoints store among them."""
    state.pop(f"{prefix}transformer.text_model.embeddings.position_ids", None)
    module._has_weights |= any(key.startswith(f"{prefix}transformer.") for key in state)
