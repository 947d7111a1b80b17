"""`python -m lutetia.coordinator.alerts`: sends one message that it reads from its standard input, by HTTP or SMTP."""

from __future__ import annotations

import json
import smtplib
import ssl
import sys
import urllib.request
from email.message import EmailMessage
from pathlib import Path
from typing import Any

_SECONDS = 20.0
_LARGEST = 1 << 20


def main() -> int:
    """Returns the exit code; a failure is one line on stderr."""
    order = json.loads(sys.stdin.buffer.read(_LARGEST))
    send = {"webhook": post, "mail": mail}[order["channel"]]
    try:
        send(order)
    except (OSError, smtplib.SMTPException, ValueError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}".splitlines()[0] + "\n")
        return 1
    return 0


def post(order: dict[str, Any]) -> None:
    """POST the message as JSON. Raises OSError."""
    body = {"text": order["text"], "content": order["text"][:2000], "run": order["run"], "causes": order["causes"]}
    headers = {"Content-Type": "application/json", "User-Agent": "lutetia"}
    request = urllib.request.Request(order["settings"]["webhook"], json.dumps(body).encode(), headers, method="POST")
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        answer.read(1024)


def mail(order: dict[str, Any]) -> None:
    """Send the message as mail. Raises OSError or SMTPException."""
    settings = order["settings"]["mail"]
    message = EmailMessage()
    message["From"], message["To"] = settings["sender"], ", ".join(settings["to"])
    message["Subject"] = f"Run {order['run']}: {len(order['causes'])} red"
    message.set_content(order["text"])
    host, _, port = settings["server"].rpartition(":")
    context = ssl.create_default_context()
    if settings["security"] == "tls":
        server: smtplib.SMTP = smtplib.SMTP_SSL(host, int(port), timeout=_SECONDS, context=context)
    else:
        server = smtplib.SMTP(host, int(port), timeout=_SECONDS)
    with server:
        if settings["security"] == "starttls":
            server.starttls(context=context)
        if settings["user"]:
            server.login(settings["user"], _password(settings["password_file"]))
        server.send_message(message)


def _password(path: str | None) -> str:
    if path is None:
        raise ValueError("a user is set without password_file")
    return Path(path).read_text().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
