"""A peer's badge and card as SVG, for a README or a page elsewhere. They have no style, script or link: nothing runs in them."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any
from xml.sax.saxutils import escape, quoteattr

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi import Path as PathParameter

from lutetia.coordinator.web.api.answers import SAFE
from lutetia.coordinator.web.api.people import CreditDocument
from lutetia.coordinator.web.api.source import RunSource
from lutetia.protocol.schema.identity import peer_id_of, public_key_of
from lutetia.system.errors import plain

_FONT = 'font-family="Verdana,DejaVu Sans,sans-serif"'
_LETTER = 6.6
"""Width of a letter at size 11, about: `textLength` makes the text as wide as its box allows."""
_MOST_LETTERS = 64
_SVG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/svg+xml": {}}, "description": "The picture"},
    404: {"description": "There is no such thing"},
}
Peer = Annotated[str, PathParameter(max_length=128)]


def in_flops(value: float) -> str:
    """A number of FLOPs with three digits and a prefix, such as 1.25 PFLOP."""
    for unit in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if value < 999.5:
            return f"{value:.3g} {unit}FLOP"
        value /= 1000
    return f"{value:.4g} YFLOP"


def cut(text: str) -> str:
    """`text` on one printable line that is not too long."""
    text = plain(text)
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


def shown(text: str) -> str:
    """`text` as a picture may hold it: printable, not too long, and no markup."""
    return escape(cut(text))


def badge(run: str, credit: CreditDocument) -> str:
    """The name of the run, and the credit beside it, as shields.io draws badges."""
    left, right = shown(run), shown(in_flops(credit.total))
    split, end = _width(run), _width(run) + _width(in_flops(credit.total))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{end}" height="20" role="img" '
        f"aria-label={quoteattr(f'{cut(run)}: {in_flops(credit.total)}')}><title>{left}: {right}</title>"
        f'<rect width="{split}" height="20" fill="#4a4a4a"/><rect x="{split}" width="{end - split}" height="20" fill="#1f6feb"/>'
        f'<g fill="#fff" text-anchor="middle" {_FONT} font-size="11">'
        f'<text x="{split / 2:g}" y="14">{left}</text><text x="{(split + end) / 2:g}" y="14">{right}</text></g></svg>'
    )


def card(run: str, name: str, peer_id: str, credit: CreditDocument, accepted: int) -> str:
    """What a peer did for a run: name, credit, recent average, accepted epochs, and what the credit is made of."""
    who = shown(name or f"node …{peer_id[-8:]}")
    lines = (
        (f"{in_flops(credit.total)} for {run}", 22),
        (f"{in_flops(credit.recent)} per day lately", 13),
        (f"{accepted} accepted {'epoch' if accepted == 1 else 'epochs'}", 13),
    )
    texts = "".join(
        f'<text x="20" y="{70 + 26 * row}" font-size="{size}" fill="#24292f">{shown(line)}</text>'
        for row, (line, size) in enumerate(lines)
    )
    parts, at, bars = (("#1f6feb", credit.epochs), ("#2da44e", credit.audits), ("#bf8700", credit.copies)), 20.0, ""
    for colour, part in parts:
        width = 440 * part / credit.total if credit.total else 0.0
        bars += f'<rect x="{at:.1f}" y="142" width="{width:.1f}" height="8" fill="{colour}"/>'
        at += width
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="480" height="190" viewBox="0 0 480 190" role="img" '
        f"aria-label={quoteattr(f'{cut(name) or peer_id}: {in_flops(credit.total)} for {cut(run)}')}>"
        f'<title>{who}</title><rect width="480" height="190" rx="8" fill="#ffffff" stroke="#d0d7de"/><g {_FONT}>'
        f'<text x="20" y="36" font-size="17" font-weight="bold" fill="#24292f">{who}</text>{texts}</g>'
        f'<rect x="20" y="142" width="440" height="8" fill="#eaeef2"/>{bars}'
        f'<g {_FONT} font-size="11" fill="#57606a"><text x="20" y="170">'
        "blue: epochs · green: audits, checks · yellow: copies</text>"
        f'<text x="460" y="170" text-anchor="end">…{shown(peer_id[-8:])}</text></g></svg>'
    )


def _width(text: str) -> int:
    return round(_LETTER * len(cut(text))) + 12


def picture(request: Request, text: str) -> Response:
    """The SVG `text`, or 304 if the client has it."""
    tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:20]}"'
    headers = {**SAFE, "ETag": tag}
    known = {given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")}
    if tag in known:
        return Response(status_code=304, headers=headers)
    return Response(text, media_type="image/svg+xml", headers=headers)


def add_badges(router: APIRouter, source: RunSource) -> None:
    """Add the routes of badges and cards."""

    def owner_of(peer: str) -> str:
        owner = public_key_of(peer) or peer
        known = source.people().run
        if owner not in known.credit and owner not in {node.owner for node in source.status().nodes}:
            raise HTTPException(404, "the run knows no such peer: it is not online and has no credit")
        return owner

    @router.get("/peers/{peer}/badge.svg", response_class=Response, responses=_SVG)
    async def peer_badge(request: Request, peer: Peer) -> Response:
        """A badge with the peer's credit, by peer id or public key."""
        owner = owner_of(peer)
        return picture(request, badge(source.manifest().name, source.people().credit(owner, source.status().time)))

    @router.get("/peers/{peer}/card.svg", response_class=Response, responses=_SVG)
    async def peer_card(request: Request, peer: Peer) -> Response:
        """A card with the peer's name, credit and accepted epochs, by peer id or public key."""
        owner, people, status = owner_of(peer), source.people(), source.status()
        name = next((node.name for node in status.nodes if node.owner == owner), "") or people.name(owner)
        credit, accepted = people.credit(owner, status.time), people.run.peer(owner).accepted
        return picture(request, card(source.manifest().name, name, peer_id_of(owner), credit, accepted))
