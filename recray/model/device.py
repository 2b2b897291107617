"""Where tensors live."""

from __future__ import annotations

import torch

from recray.errors import SettingsError


def device(setting: str, *, gpu: bool) -> torch.device:
    """The GPU of this process, if `gpu`, else the CPU.

    setting : what asks for it, for the error

    Raises SettingsError where there is none.
    """
    if not gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        what = f"{setting} asks for a GPU, but torch {torch.__version__} sees none"
        raise SettingsError(what, "install a CUDA build of torch and its driver, or let the CPU do it")
    return torch.device("cuda", torch.cuda.current_device())
