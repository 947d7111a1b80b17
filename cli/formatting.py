"""Numbers and keys as people read them."""

from __future__ import annotations

_UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))


def ago(seconds: float | None) -> str:
    """A duration in its largest fitting unit: `4 min`, `12 s`; `-` for none."""
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def clock(seconds: float | None) -> str:
    """A remaining or elapsed time as m:ss or h:mm:ss."""
    if seconds is None or seconds != seconds or seconds == float("inf"):
        return "-"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short(key: str | None, length: int = 8) -> str:
    """The start of a digest or public key."""
    return key[:length] if key else "-"


def short_peer(peer_id: str) -> str:
    """The end of a peer id: all Ed25519 ids start alike."""
    return "…" + peer_id[-8:]


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def thousands(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def bar(share: float, width: int = 12) -> str:
    """A text bar of `width` cells."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)
