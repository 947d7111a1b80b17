"""Numbers, times and keys as readable text."""

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
    """A duration as m:ss or h:mm:ss; `-` where there is none or it is infinite."""
    if seconds is None or seconds != seconds or seconds == float("inf"):
        return "-"
    minutes, remainder = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{remainder:02d}" if hours else f"{minutes}:{remainder:02d}"


def short(key: str | None, length: int = 8) -> str:
    """The first `length` characters of a digest or public key; `-` for none."""
    return key[:length] if key else "-"


def short_peer(peer_id: str) -> str:
    """The end of a peer id, since all Ed25519 ids start alike."""
    return "…" + peer_id[-8:]


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` decimals; `-` for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def rate(per_second: float) -> str:
    """A rate per second; a slow one keeps two digits, because a volunteer with a large model would see 0.0."""
    return f"{per_second:.1f}" if per_second >= 1 or not per_second else f"{per_second:.2g}"


def thousands(value: int) -> str:
    """An integer with spaces between thousands."""
    return f"{value:,}".replace(",", " ")


def size(count: float) -> str:
    """A number of bytes with its binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def decimal_size(count: float) -> str:
    """A number of bytes with its decimal unit, as in the settings."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def bar(share: float, width: int = 12) -> str:
    """A text bar of `width` cells, of which `share` (0 to 1) are full."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)
