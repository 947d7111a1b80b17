"""Trains one step of every supported class after `import_experts`, as a trainer process does. Prints the losses."""

from __future__ import annotations

import sys

from lutetia.models.fast_import import import_experts

import_experts()

import torch  # noqa: E402

from lutetia.models.training.trainer import ExpertTrainer  # noqa: E402
from lutetia.protocol.schema.model.expert_spec import ExpertSpec  # noqa: E402
from tests.models.tiny_experts import CONFIGS, tiny_data, tiny_manifest  # noqa: E402

torch.set_num_threads(1)
rotary = {**CONFIGS["CogVideoXTransformer3DModel"], "use_rotary_positional_embeddings": True}
for name, config in [*CONFIGS.items(), ("CogVideoXTransformer3DModel", rotary)]:
    spec = ExpertSpec(class_name=name, config=config)
    print(name, ExpertTrainer(tiny_manifest(expert=spec), 0, tiny_data()).step())
assert "transformers.models.auto" not in sys.modules, "no text encoder can be loaded here"
if len(sys.argv) > 1:  # a folder for a base: an adapter imports peft, and with it transformers, when it is built
    from pathlib import Path

    from tests.models.experts.tiny_base import adapting, tiny_base

    files = tiny_base(Path(sys.argv[1]))
    print("adapter", ExpertTrainer(tiny_manifest(expert=adapting(files)), 0, tiny_data(), base=files).step())
