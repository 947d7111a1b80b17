"""What the owner of a run says in the model card of its mixture."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import Label

CardText = Annotated[str, Field(max_length=2000)]


class CardSpec(WireDocument):
    """What the owner says of the mixture; the rest of the card is what the run itself knows."""

    description: CardText = Field(default="", description="What the mixture is for, in a sentence or two")
    license: Label | None = Field(default=None, description="Licence of the weights, by its name on model hubs, like apache-2.0")
    base_license: Label | None = Field(default=None, description="Licence of the model that the experts start from")
    data: CardText = Field(default="", description="Where the clips come from, in a sentence or two")
    data_license: Label | None = Field(default=None, description="Licence of the clips")
