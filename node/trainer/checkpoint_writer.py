"""Writes a trainer's checkpoints and local states in the background, so that the step loop does not wait for the disk.

A snapshot is read tensor by tensor while the next step computes its gradients (`LiveSnapshot`). On a full disk the loop waits
before that step's update until the checkpoint is written; a local state is given up and tried again from a later step.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_io import Snapshot, write_state, write_weights
from lutetia.models.training.replay import made_with
from lutetia.node.trainer.checkpoint_folder import CHECKPOINT, FILES, CheckpointFolder, KeptCheckpoint, LocalState
from lutetia.node.trainer.messages import CheckpointWritten, DiskReport, FromTrainer, LocalStateSaved
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.rpc.introduction import software_version
from lutetia.protocol.schema.canonical import canonical
from lutetia.system.errors import DiskError
from lutetia.system.files import disk_errors, fsync_folder, make_folder, write_atomic

log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0


@dataclass(frozen=True)
class _Job:
    snapshot: Snapshot
    whole: bool
    """True: a checkpoint at the end of an epoch; False: a local state."""
    budget: int | None


class CheckpointWriter:
    """One background thread with a queue of one job.

    Args:
        folder: the folder of the slot that is trained.
        parent: digest of the checkpoint that training starts from; None at epoch 0.
        send: sends a report to the supervisor.
    """

    def __init__(self, folder: CheckpointFolder, parent: str | None, send: Callable[[FromTrainer], None]) -> None:
        self.folder, self.parent, self.send = folder, parent, send
        self._job: _Job | None = None
        self._busy = False
        self._closing = False
        self._ended_well = False
        self.disk_full = False
        self.processor_seconds = 0.0
        """Of this thread, for the last local state."""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        return self._job is None and not self._busy

    @property
    def alive(self) -> bool:
        """False when the writer has ended: by an error that the log names, or closed."""
        return self._thread.is_alive()

    def submit(
        self, snapshot: Snapshot, *, whole: bool, budget: int | None = None, may_wait: Callable[[], bool] = lambda: True
    ) -> bool:
        """Queue a snapshot; it replaces a queued local state. Returns whether it was queued.

        Args:
            whole: it is a checkpoint at the end of an epoch; otherwise a local state.
            budget: epoch budget under which it was trained.
            may_wait: while a checkpoint is queued, wait as long as this returns True.
        """
        with self._changed:
            while self._job is not None and self._job.whole:
                if not may_wait() or not self._thread.is_alive():
                    return False
                self._changed.wait(0.2)
            if not self._thread.is_alive():
                raise RuntimeError("the checkpoint writer has ended; its error is logged above")
            if self._job is not None:
                self._job.snapshot.release()
            self._job = _Job(snapshot, whole, budget)
            self._changed.notify_all()
            return True

    def close(self) -> bool:
        """Write what is queued, and end. On a full disk it tries once more. Returns whether everything was written.

        Raises RuntimeError if an unexpected error has ended the writer.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if not self._ended_well:
            raise RuntimeError("the checkpoint writer has ended; its error is logged above")
        return self._job is None

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._job is None and not self._closing:
                    self._changed.wait()
                if self._job is None:
                    self._ended_well = True
                    return
                job, self._job, self._busy = self._job, None, True
                self._changed.notify_all()
            written = False
            try:
                written = self._persist(job)
            finally:
                if written or not job.whole:
                    job.snapshot.release()
            with self._changed:
                self._busy = False
                if not written and self._job is None:
                    self._job = job  # for `close` to report
                self._changed.notify_all()
                if not written:
                    self._ended_well = True
                    return

    def _persist(self, job: _Job) -> bool:
        """Write the job. Returns whether that is settled.

        A local state that the disk refuses is dropped. A checkpoint is tried again until it is written or the writer closes; it
        is lost if the disk refused it after the trainer had gone on, which the reserved space makes unlikely.
        """
        while True:
            closing = self._closing
            try:
                self._write(job)
            except DiskError as error:
                self._report_full(str(error))
            else:
                self._report_free()
                return True
            if not job.whole and not closing:
                return True
            if closing or not job.snapshot.rewind():
                return False
            with self._changed:
                self._changed.wait_for(lambda: self._closing, RETRY_SECONDS)

    def _write(self, job: _Job) -> None:
        if job.whole:
            self._write_checkpoint(job.snapshot)
        else:
            begun = time.thread_time()
            self._write_local(job.snapshot, job.budget)
            self.processor_seconds = time.thread_time() - begun

    def _write_local(self, snapshot: Snapshot, budget: int | None) -> None:
        name = f"local-{snapshot.epoch}-{snapshot.step}.safetensors"
        with disk_errors(self.folder.path):
            write_state(snapshot, self.folder.path / name)
            local = LocalState(file=name, epoch=snapshot.epoch, step=snapshot.step, parent=self.parent, budget=budget)
            self.folder.set_local(local)
        self.send(LocalStateSaved(epoch=snapshot.epoch, step=snapshot.step))

    def _write_checkpoint(self, snapshot: Snapshot) -> None:
        target = self.folder.epoch_folder(snapshot.epoch)
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            with disk_errors(target):
                kept = self._fill(part, snapshot)
                self.folder.drop_epoch(snapshot.epoch)
                os.replace(part, target)
                fsync_folder(target.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.parent = kept.digest
        self.folder.drop_local()  # it belongs to the finished epoch
        self.send(CheckpointWritten(kept=kept))

    def _fill(self, part: Path, snapshot: Snapshot) -> KeptCheckpoint:
        make_folder(part.parent)
        part.mkdir()
        paths = {name: part / f"{name}.safetensors" for name in FILES}
        write_weights(snapshot, paths["weights"])
        write_state(snapshot, paths["state"], ema=False)  # the weights file holds the EMA
        write_tensors(paths["trace"], {"trace": torch.tensor(snapshot.trace, dtype=torch.float32)})
        refs = {name: ChunkTable.of_file(path).ref for name, path in paths.items()}
        kept = KeptCheckpoint(
            run=snapshot.run, shard=snapshot.shard, lane=self.folder.lane, epoch=snapshot.epoch, parent=self.parent,
            samples=snapshot.samples, loss=sum(snapshot.trace) / len(snapshot.trace), **refs,
            made=made_with(
                snapshot.device, snapshot.precision, snapshot.micro_batch, software_version(), snapshot.memory, snapshot.kernels
            ),
        )  # fmt: skip
        write_atomic(part / CHECKPOINT, canonical(kept))
        return kept

    def _report_full(self, text: str) -> None:
        if not self.disk_full:
            self.disk_full = True
            self.send(DiskReport(full=True, text=text))

    def _report_free(self) -> None:
        if self.disk_full:
            self.disk_full = False
            self.send(DiskReport(full=False))
