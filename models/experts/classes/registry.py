"""The diffusers classes that experts may have. To add one, describe it by a `Family` and name it here."""

from __future__ import annotations

from collections.abc import Mapping

from lutetia.models.experts.classes.cogvideox import COGVIDEOX
from lutetia.models.experts.classes.family import Family
from lutetia.models.experts.classes.hunyuan_video import HUNYUAN_VIDEO
from lutetia.models.experts.classes.ltx import LTX
from lutetia.models.experts.classes.mochi import MOCHI
from lutetia.models.experts.classes.wan import WAN
from lutetia.system.errors import ConfigError

FAMILIES: Mapping[str, Family] = {
    "WanTransformer3DModel": WAN,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "LTXVideoTransformer3DModel": LTX,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "MochiTransformer3DModel": MOCHI,
    "SkyReelsV2Transformer3DModel": WAN,
}


def family_of(class_name: str) -> Family:
    """How experts of this class are called. Raises ConfigError for a class that is not supported."""
    try:
        return FAMILIES[class_name]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"expert class {class_name!r} is not supported; use one of {known}") from None
