"""Where the arithmetic runs, and with which precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from streamx.config import TrainConfig
from streamx.errors import UsageError
from streamx.train.distributed import Ranks


def pick_device(name: str) -> torch.device:
    """``auto``: a GPU where there is one; of several, the one that ``torchrun`` means for this process.

    Raises
    ------
    UsageError
        If torch does not know the device, or has none.
    """
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} can't be used: {reason}", fix="--device cpu") from None
    return device


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's arithmetic on one thread, for the time of a call.

    Matrix products round differently on other numbers of threads, so a model would depend on the machine;
    and steps of 64 cells are so short that a second thread costs more than it gives where cores are shared.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def precision_of(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context of forward passes."""
    return nullcontext() if config.precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def check_device(config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
    """Refuse what the device can't do, before anything is written.

    Raises
    ------
    UsageError
        For bfloat16 on a CPU, or a recorded step where none can be.
    """
    if config.precision == "bfloat16" and device.type == "cpu":
        raise UsageError("precision bfloat16 saves nothing on a CPU", fix="--precision float32")
    if config.graph == "on" and not can_record(config, device, ranks):
        raise UsageError(
            "a recorded step is for one GPU, one process and no accumulation", fix="leave --graph out"
        )


def can_record(config: TrainConfig, device: torch.device, ranks: Ranks) -> bool:
    """Whether a step can be recorded (:class:`streamx.train.graph.RecordedStep`)."""
    return device.type == "cuda" and not ranks.several and config.accumulate == 1
