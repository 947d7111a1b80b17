"""How settings name the device that networks run on."""

from typing import Annotated

from pydantic import Field

Device = Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$", description="cpu, mps, cuda or cuda:N")]
