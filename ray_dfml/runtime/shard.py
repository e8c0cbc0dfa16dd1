"""A shard: the process, on a slice of a device, that hosts teachers and runs the ops.

It is a plain class that knows of no cluster. Between jobs it keeps nothing but a cache of teachers, so any shard may
run, or run again, any job.
"""

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.answers import answers
from ray_dfml.core.net import Net, net
from ray_dfml.core.steady import steady_logits
from ray_dfml.data.services import Asked
from ray_dfml.errors import RejectedError, ResourceError, rejection
from ray_dfml.ops import OPS
from ray_dfml.runtime import asking
from ray_dfml.runtime.asking import Desk
from ray_dfml.types import Access, Arrays, Job, Service, TeacherCard

Loaded = tuple[TeacherCard, np.ndarray, np.ndarray]
"""A teacher's card, flat weights [p] and batch-norm statistics [k]."""

LoadWeights = Callable[[str], Loaded]
"""Teacher id -> the teacher. Raises RejectedError for a bad teacher."""

CACHE_BYTES = 512 * 2**20
"""The most memory that the teachers on a shard occupy together."""
KEPT_BYTES = 256 * 2**20
"""Freed memory that a process keeps for its next tensors."""
CONTEXT_BYTES = 640 * 2**20
"""Memory of an accelerator that a process takes beside its tensors, generously counted: its context and its kernels."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def pick_device() -> torch.device:
    """The accelerator that this process may use, else the CPU. Only this module names the kind of accelerator."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def accelerators() -> list[str]:
    """Names of the accelerators that this process sees."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def cap_memory(share: float) -> None:
    """Let this process have its share 1/k of an accelerator's memory and no more, so that k processes have room there.

    The process's own context counts as part of the share. A whole accelerator has no cap. Raises ResourceError if the
    share has no room for anything else.
    """
    parts = round(1 / share) if share else 1
    if parts <= 1 or not torch.cuda.is_available():
        return
    whole = torch.cuda.get_device_properties(0).total_memory
    left = 1 / parts - CONTEXT_BYTES / whole
    if left <= 0:
        raise ResourceError(
            f"1/{parts} of a GPU of {whole / 2**30:.0f} GiB has no room for tensors beside the {CONTEXT_BYTES >> 20} "
            "MiB that each process takes; raise --gpus-per-worker"
        )
    torch.cuda.set_per_process_memory_fraction(left, 0)


NO_ROOM = ("DefaultCPUAllocator: can't allocate", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What errors of PyTorch, cuBLAS and cuDNN say that have no type of their own."""


def is_short_of_memory(error: Exception) -> bool:
    """Whether an error says that a device, or this machine, has no memory for an array."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_ROOM)


def keep_memory() -> None:
    """Let this process keep up to 256 MiB of freed memory for its next tensors; page faults cost a tenth of a step.

    The C library of Linux otherwise returns what a tensor held to the system as soon as it is freed, and asks for it
    again. With this bound a recovery of 100 colour images of 32x32 pixels asks for nothing again. Blocks of more than
    32 MiB are returned in any case. Other C libraries are left alone.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)
        set_option(M_MMAP_THRESHOLD, 2**25)


def pin() -> None:
    """One reduction order in every process: one thread, and no lower precision in products. Memory is kept."""
    torch.set_num_threads(1)
    keep_memory()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


@dataclass(frozen=True)
class HostedTeacher:
    """A teacher on this shard's device."""

    card: TeacherCard
    net: Net
    theta: Tensor
    stats: Tensor

    @property
    def bytes(self) -> int:
        """Memory that the teacher occupies."""
        return self.theta.nbytes + self.stats.nbytes


class Shard:
    """Runs ops. `load` fetches the weights of a teacher from wherever they are kept.

    Teachers are asked at `desk`; without one nobody is.
    """

    def __init__(self, load: LoadWeights, *, desk: Desk | None = None, device: torch.device | None = None) -> None:
        pin()
        self.device = pick_device() if device is None else device
        self.batched = self.device.type != "cpu"
        self._load, self._desk = load, desk
        self._hosted: OrderedDict[str, HostedTeacher] = OrderedDict()
        self._number = asking.enter(self)
        self._most: dict[str, int] = {}
        self._said: dict[str, int] = {}
        self._too_large = 0

    def reload(self, load: LoadWeights, desk: Desk | None = None) -> None:
        """Fetch teachers with another `load` and ask through another `desk` from now on; forget the hosted teachers."""
        self._load, self._desk = load, desk
        self._hosted.clear()

    def teacher(self, id: str) -> HostedTeacher:
        """The teacher of an id, loaded on first use. The longest unused ones go if the cache exceeds CACHE_BYTES.

        Raises RejectedError for a teacher whose access is not `weights`.
        """
        if (access := self._access(id)) != "weights":
            raise RejectedError(f"{id}: gives {access} and no weights; it can only be asked")
        return self._host(id)

    def _access(self, id: str) -> Access:
        asked = self._desk.asked if self._desk else {}
        return asked[id].card.access if id in asked else self._host(id).card.access

    def _host(self, id: str) -> HostedTeacher:
        if id in self._hosted:
            self._hosted.move_to_end(id)
            return self._hosted[id]
        card, theta, stats = self._load(id)
        network = net(card.arch, card.image.shape, len(card.classes))
        room = CACHE_BYTES - theta.nbytes - stats.nbytes
        while self._hosted and sum(hosted.bytes for hosted in self._hosted.values()) > room:
            self._hosted.popitem(last=False)
        self._hosted[id] = HostedTeacher(
            card, network, torch.tensor(theta, device=self.device), torch.tensor(stats, device=self.device)
        )
        return self._hosted[id]

    def service(self, id: str) -> Service:
        """The teacher of an id as one that is only asked, whatever its access; weights give logits.

        Raises RejectedError for a teacher that this run does not ask.
        """
        if self._desk is None or id not in self._desk.asked:
            raise RejectedError(f"{id}: cannot be asked, since this run has no ledger for it")
        asked = self._desk.asked[id]
        if asked.api is not None:
            return asking.RemoteService(asked.card, self._desk)
        return asking.WrappedModel(asked, self._desk, self._number)

    def answers(self, asked: Asked, images: np.ndarray) -> np.ndarray:
        """What a model of this machine answers to images; see `asking.WrappedModel`, which alone calls it."""
        teacher = self._host(asked.card.id)
        mean, std = (torch.tensor(values) for values in (teacher.card.image.mean, teacher.card.image.std))
        logits = steady_logits(teacher.net, teacher.theta, teacher.stats, images, mean, std)
        return answers(logits, asked.card.access, decimals=asked.terms.decimals, top_k=asked.terms.top_k)

    def run(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """Run `op`: one result per job, in order. The result is `{"rejected": reason}` if the job's teacher is bad.

        A batch that is too large for the memory of the device is done in halves, and later batches of the op have no
        more jobs than fitted. A teacher whose job alone is too large is rejected. Raises ResourceError if such a job
        has no teacher.
        """
        most = self._most.get(op, len(jobs))
        if len(jobs) > most:
            return self._parts(op, [jobs[start : start + most] for start in range(0, len(jobs), most)], shared)
        try:
            return OPS[op](self, jobs, shared)
        except RejectedError as error:
            if len(jobs) == 1:
                return [rejection(error)]
            parts = [[job] for job in jobs]
        except Exception as error:
            if not is_short_of_memory(error):
                raise
            parts = []
        self._free()  # what the batch left behind; here its tensors are gone
        if parts:
            return self._parts(op, parts, shared)
        if len(jobs) == 1:
            return [self._alone(op, jobs[0], shared)]
        before, too_large, self._most[op] = self._most.get(op), self._too_large, (len(jobs) + 1) // 2
        results = self.run(op, jobs, shared)
        if self._too_large > too_large:  # one job was to blame, and not how many they were
            self._most.pop(op) if before is None else self._most.update({op: before})
        return results

    def _parts(self, op: str, parts: Sequence[Sequence[Job]], shared: Arrays) -> list[Arrays]:
        return [result for part in parts for result in self.run(op, part, shared)]

    def _alone(self, op: str, job: Job, shared: Arrays) -> Arrays:
        """Run a job again that had no room, with no teacher in memory but its own."""
        self._hosted.clear()
        self._free()
        try:
            return OPS[op](self, [job], shared)[0]
        except RejectedError as error:
            return rejection(error)
        except Exception as error:
            if not is_short_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            said = f"{op} needs more memory than a shard has: {reason}"
        self._free()
        self._too_large += 1
        if job.teacher is None:
            raise ResourceError(f"{said}; give shards more, as with a larger --gpus-per-worker")
        return {"rejected": said}

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def news(self) -> list[str]:
        """Lines, each said once, about batches that are smaller than they were to be, since memory was short."""
        new = {op: most for op, most in self._most.items() if self._said.get(op) != most}
        self._said |= new
        return [f"memory of a shard was short: {op} does at most {most} jobs at a time" for op, most in new.items()]
