"""What may happen to a volunteer's box: killed anywhere, stopped, asleep, robbed of its trainer or of its network process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lutetia.coordinator.ledger.events import ResultRefused
from lutetia.node.trainer.checkpoint_folder import CheckpointFolder
from tests.faults.world.pair import Pair, caught, owner, parts, torn
from tests.faults.world.processes import gone, litter, until
from tests.faults.world.world import LEASE, Box, acceptances, accepted, events

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]


async def test_killed_in_the_middle_of_a_step(pair: Pair) -> None:
    """F1. The other box goes on from the last accepted checkpoint; of the dead one no process is left."""
    holder, standby = await pair.ready()
    await holder.until(step=lambda step: step and step > 2)
    before = len(acceptances(pair.coordinator.run))
    await holder.end(signal.SIGKILL)
    await pair.taken_over(standby)
    lineage = acceptances(pair.coordinator.run)
    assert len(lineage) > before, "what was accepted stays accepted"
    assert lineage[-1].author == await owner(standby)


async def test_killed_in_the_middle_of_writing_a_checkpoint(pair: Pair) -> None:
    """F1. A torn file never counts, and the next daemon on the folder sweeps it away."""
    holder, standby = await pair.ready()
    trainer = holder.child("trainer")

    def torn_epoch() -> list[Path]:
        return [path for path in parts(holder.work) if "epoch" in str(path.relative_to(holder.work))]

    await caught(torn_epoch, trainer.suspend, trainer.resume, "a checkpoint being written")
    halves = torn_epoch()
    await holder.end(signal.SIGKILL)
    assert any(path.exists() for path in halves), "it was killed before the file was whole"
    await pair.taken_over(standby)
    again = await pair.join(holder.name)
    await again.until(state="idle")
    await standby.end(signal.SIGKILL)  # so that the box with the torn file has to train again
    await pair.taken_over(again)
    assert not any(path.exists() for path in halves), "it was swept away"


async def test_killed_in_the_middle_of_an_upload(pair: Pair) -> None:
    """F1. The coordinator keeps no torn blob; the epoch is trained and accepted from the other box."""
    holder, standby = await pair.ready()
    incoming = pair.coordinator.run / "incoming"
    family = [one for one in holder.family() if one.pid != os.getpid()]

    def halt() -> None:
        for one in family:
            one.suspend()

    def go() -> None:
        for one in reversed(family):
            one.resume()

    await caught(lambda: torn(incoming), halt, go, "a checkpoint being fetched")
    await holder.end(signal.SIGKILL)
    assert torn(incoming), "it was killed before the file was whole"
    await pair.taken_over(standby)
    refusals = [event for event in events(pair.coordinator.run) if isinstance(event, ResultRefused)]
    assert all((event.verdict, event.check) == ("inconclusive", "transfer") for event in refusals), "nobody is blamed for dying"


async def test_asked_to_stop_it_hands_its_work_in(pair: Pair) -> None:
    """F2. SIGTERM: exit code 0, the checkpoint under way is accepted, the shard is free at once, nothing is left."""
    holder, standby = await pair.ready()
    author, before = await owner(holder), acceptances(pair.coordinator.run)[-1].epoch
    assert await holder.end(signal.SIGTERM) == 0, holder.words()[-3000:]
    assert "the last checkpoint is accepted; leaving" in holder.words()
    last = [one for one in acceptances(pair.coordinator.run) if one.author == author][-1]
    assert last.epoch > before, "the checkpoint under way was handed in"
    await standby.until(LEASE * 10, state="training")
    await until(lambda: pair.coordinator.health(author) != "working", "the status not to call working who left", LEASE * 10)
    assert not litter(holder.state)


async def test_asleep_past_its_lease_it_wakes_up_fenced(pair: Pair) -> None:
    """F3. The lid of a laptop: every process stops. Its stale claim and its late work change nothing."""
    holder, standby = await pair.ready()
    sleeper, mark = await owner(holder), holder.mark()
    holder.signal_all(signal.SIGSTOP)
    await pair.taken_over(standby)
    at = len(acceptances(pair.coordinator.run))
    holder.signal_all(signal.SIGCONT)
    await holder.until(state="idle")
    await pair.coordinator.accepts(1, author=await owner(standby))
    since = acceptances(pair.coordinator.run)[at:]
    assert sleeper not in {one.author for one in since}, "nothing of the sleeper was accepted after its fall"
    assert "shard 0" in holder.words(mark), "and it says why it stopped"


async def test_its_trainer_is_killed_for_memory(pair: Pair) -> None:
    """F15. What the kernel does to a process that takes too much: the daemon starts another from the last local state."""
    holder, _ = await pair.ready()
    trainer, work = holder.child("trainer"), CheckpointFolder(holder.work.parent, pair.world.run.run, 0)

    def in_an_epoch() -> bool:
        local, done = work.local(), [kept.epoch for kept in work.kept()]
        return local is not None and local.step > 0 and local.epoch == max([accepted(pair.coordinator.run), *done])

    await caught(in_an_epoch, trainer.suspend, trainer.resume, "an epoch of which a local state is saved")
    mark, local = holder.mark(), work.local()
    trainer.kill()
    await holder.says("the trainer failed (it was killed by signal 9)", mark)
    await holder.says("is at work on cpu", mark)
    status = await holder.until(state="training", step=lambda step: step)
    await pair.coordinator.accepts(1, author=status["owner"])
    assert local
    assert f"starts from local, epoch {local.epoch}" in holder.words(mark), "nothing is trained again that was saved"


async def test_its_trainer_hangs(pair: Pair) -> None:
    """F15. A driver that never answers: the silent trainer is killed and started again, while the daemon holds the lease."""
    holder, standby = await pair.ready()
    trainer, mark = holder.child("trainer"), holder.mark()
    trainer.suspend()
    await holder.says("no report for", mark)
    await gone([trainer])
    status = await holder.until(state="training", step=lambda step: step)
    await pair.coordinator.accepts(1, author=status["owner"])
    assert (await standby.status())["state"] == "idle", "the lease was never lost"


async def test_its_network_process_is_killed(pair: Pair) -> None:
    """F5. hivemind's own sign of life lies then; ours does not. Training goes on while the network is built anew."""
    holder, _ = await pair.ready()
    trainer, author = holder.child("trainer"), await owner(holder)
    holder.child("p2pd").kill()
    await holder.until(online=False)
    await holder.until(online=True, state="training")
    assert holder.child("trainer").pid == trainer.pid, "training went on"
    await pair.coordinator.accepts(1, author=author)


async def test_the_same_key_on_two_boxes(pair: Pair, tmp_path: Path) -> None:
    """F13. The second is refused by one sentence that says where the first is, and the first goes on."""
    holder, _ = await pair.ready()
    copy = tmp_path / "copy"
    copy.mkdir(mode=0o700)
    (copy / "identity.key").write_bytes((holder.state / "identity.key").read_bytes())
    (copy / "identity.key").chmod(0o600)
    second = await pair.world.box("copy", state=copy)
    code = await until(lambda: second.process.returncode, "the copy to be refused")
    assert code == 11, second.words()
    assert "another node is online under this identity, at /ip4/127.0.0.1/" in second.words().splitlines()[-1]
    await pair.coordinator.accepts(1, author=await owner(holder))


async def test_two_daemons_on_one_state_folder(pair: Pair) -> None:
    """F19. The second names the first and leaves it alone."""
    holder, _ = await pair.ready()
    second = await pair.world.box("second", state=holder.state)
    code = await until(lambda: second.process.returncode, "the second daemon to be refused")
    assert code == 11, second.words()
    assert f"pid {holder.process.pid}" in second.words().splitlines()[-1]
    assert isinstance(holder, Box)
    await pair.coordinator.accepts(1, author=await owner(holder))
