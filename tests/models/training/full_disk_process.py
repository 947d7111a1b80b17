"""Fills a small file system while a trainer writes its state: the last whole state must stay usable."""

import sys
from pathlib import Path

from lutetia.models.training.trainer import ExpertTrainer, write_state
from lutetia.system.errors import DiskError
from tests.models.tiny_experts import tiny_data, tiny_manifest

folder = Path(sys.argv[1])
trainer = ExpertTrainer(tiny_manifest(), 0, tiny_data())
trainer.step()
write_state(trainer.snapshot(), folder / "state")
whole = (folder / "state").read_bytes()
(folder / "filler").write_bytes(bytes(300_000))
trainer.step()
try:
    write_state(trainer.snapshot(), folder / "state")
except DiskError as error:
    print(error)
assert (folder / "state").read_bytes() == whole
assert sorted(path.name for path in folder.iterdir()) == ["filler", "state"]
trainer.restore(0, local=folder / "state")
print(trainer.step_in_epoch)
