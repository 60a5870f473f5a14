"""The CompVis dialect -> ours: configs written for CompVis/latent-diffusion, for Stable Diffusion 1 and 2, and for
generative-models (`sgm`) build our objects, unedited.

One table, old target -> translation of its parameters; a node that is not in it is ours already. Translations work on
dicts and strings alone and import no network. Keys that the original swallowed without effect are dropped by name, and
every key that nothing knows is an error with the nearest one that exists.
"""

from typing import Any

from ldm.compat.compvis import conditioning, data, diffusion, encoder_decoder, first_stage, lightning, networks, sgm
from ldm.compat.compvis.params import Translate, apply
from ldm.config.nodes import is_node
from ldm.config.targets import is_slip
from ldm.errors import ConfigError

__all__ = ["TABLE", "translate", "translate_node"]

TABLE: dict[str, Translate] = {
    **networks.TABLE,
    **encoder_decoder.TABLE,
    **first_stage.TABLE,
    **conditioning.TABLE,
    **diffusion.TABLE,
    **data.TABLE,
    **sgm.TABLE,
}
_FOREIGN = (
    "ldm.models.diffusion.", "ldm.models.autoencoder.", "ldm.modules.", "ldm.lr_scheduler.", "ldm.util.", "main.",
    "taming.models.", "sgm.",
)  # fmt: skip
_OURS = ("ldm.models.autoencoder.Autoencoder", "ldm.models.autoencoder.IdentityAutoencoder")
_TRAININGS = ("ldm.training.latent_diffusion.DiffusionTraining", "ldm.training.autoencoder.AutoencoderTraining")


def translate(config: dict[str, Any]) -> dict[str, Any]:
    """Translate a whole file, whose `model` becomes the sections `model` and `training`; or a single node.

    Raises ConfigError.
    """
    if "target" in config:
        return translate_node(config)
    translated = {key: translate_node(config[key], key) for key in ("model", "data") if key in config}
    if is_node(model := translated.get("model")) and model["target"] in _TRAININGS:
        translated["training"] = model
        translated["model"] = model["params"].pop("model")
    if "lightning" in config:
        translated["lightning"] = lightning.translate(config["lightning"])
    if (precision := networks.precision(config.get("model"))) is not None:
        translated["lightning"] = lightning.with_precision(translated.get("lightning"), precision)
    return {**translated, **{key: value for key, value in config.items() if key not in translated}}


def _translation_of(target: Any) -> Translate | None:
    if not isinstance(target, str):
        return None
    return TABLE.get(target) or data.without_counterpart(target)


def translate_node(node: Any, path: str = "") -> Any:
    """Translate a node and the nodes inside it; anything else is returned as it is. Raises ConfigError."""
    if isinstance(node, list):
        return [translate_node(value, f"{path}[{index}]") for index, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    target = node.get("target")
    translation = _translation_of(target)
    if translation is not None:
        return apply(translation, node, path, translate_node)
    if isinstance(target, str) and target.startswith(_FOREIGN) and target not in _OURS:
        meant = next((known for known in TABLE if is_slip(target, known)), None)
        hint = f"did you mean {meant}?" if meant else "no translation of it exists"
        raise ConfigError(f"{target} is unknown; {hint}", f"{path}.target".lstrip("."))
    return {key: translate_node(value, f"{path}.{key}".lstrip(".")) for key, value in node.items()}
