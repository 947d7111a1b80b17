"""The diffusers classes that experts may have. To add one, describe it by a `Family` and name it here."""

from __future__ import annotations

from collections.abc import Mapping

from lutetia.models.experts.classes.cogvideox import COGVIDEOX
from lutetia.models.experts.classes.family import Family
from lutetia.models.experts.classes.hunyuan_video import HUNYUAN_VIDEO
from lutetia.models.experts.classes.ltx import LTX
from lutetia.models.experts.classes.mochi import MOCHI
from lutetia.models.experts.classes.others import ALLEGRO, COSMOS, EASY_ANIMATE, LATTE, SANA_VIDEO
from lutetia.models.experts.classes.wan import LIKE_WAN, WAN
from lutetia.system.errors import ConfigError

FAMILIES: Mapping[str, Family] = {
    "WanTransformer3DModel": WAN,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "LTXVideoTransformer3DModel": LTX,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "MochiTransformer3DModel": MOCHI,
    "SkyReelsV2Transformer3DModel": LIKE_WAN,
    "ChronoEditTransformer3DModel": LIKE_WAN,
    "AllegroTransformer3DModel": ALLEGRO,
    "CosmosTransformer3DModel": COSMOS,
    "EasyAnimateTransformer3DModel": EASY_ANIMATE,
    "LatteTransformer3DModel": LATTE,
    "SanaVideoTransformer3DModel": SANA_VIDEO,
}

REFUSED: Mapping[str, str] = {
    "AnyFlowFARTransformer3DModel": "it learns jumps between two times, which the flow's loss does not train",
    "AnyFlowTransformer3DModel": "it learns jumps between two times, which the flow's loss does not train",
    "ConsisIDTransformer3DModel": "it needs a person's face beside the text",
    "Cosmos3OmniTransformer": "it reads the words itself, in one sequence with the clip",
    "HeliosTransformer3DModel": "it needs the history of the clip that it continues",
    "HunyuanVideo15Transformer3DModel": "it needs a first frame and two token sequences",
    "HunyuanVideoFramepackTransformer3DModel": "it needs a picture and the history of the clip that it continues",
    "JoyImageEditPlusTransformer3DModel": "it edits pictures that are given to it",
    "JoyImageEditTransformer3DModel": "it edits pictures that are given to it",
    "Kandinsky5Transformer3DModel": "it takes latents with channels last, and sparse attention",
    "Kandinsky6SRTransformer3DModel": "it enlarges clips that are given to it",
    "Kandinsky6Transformer3DModel": "it draws sound beside the clip",
    "LTX2VideoTransformer3DModel": "it draws sound beside the clip",
    "MiniMaxH3Transformer3DModel": "it draws sound beside the clip",
    "MotifVideoTransformer3DModel": "it needs a first frame beside the text",
    "SanaWMLTX2RefinerTransformer3DModel": "it refines clips that are given to it",
    "SanaWMTransformer3DModel": "it needs the path of a camera beside the text",
    "TransformerTemporalModel": "it is a layer of other models",
    "WanAnimate2Transformer3DModel": "it needs a person's pose and face beside the text",
    "WanAnimateTransformer3DModel": "it needs a person's pose and face beside the text",
    "WanVACETransformer3DModel": "it needs a control clip beside the text",
}
"""Video transformers of diffusers that experts cannot have, and why."""


def family_of(class_name: str) -> Family:
    """How experts of this class are called. Raises ConfigError for a class that is not supported."""
    try:
        return FAMILIES[class_name]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        if class_name in REFUSED:
            text = f"expert class {class_name!r} is not supported: {REFUSED[class_name]}; use one of {known}"
            raise ConfigError(text) from None
        raise ConfigError(f"expert class {class_name!r} is not supported; use one of {known}") from None
