"""The type of the setting that names the device on which networks run."""

from typing import Annotated

from pydantic import Field

Device = Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$", description="cpu, mps, cuda or cuda:N")]
