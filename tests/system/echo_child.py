"""A child process that answers each message with the variable it asks for, and ends with exit code 7."""

from __future__ import annotations

import os
import sys

from lutetia.system.process import ParentChannel

channel = ParentChannel()
for message in channel.messages():
    value = os.environ.get(message["ask"])
    channel.send({"value": value, "arguments": sys.argv[1:], "cwd": os.getcwd(), "group": os.getpgid(0)})
sys.exit(7)
