"""The device that tensors are stored on."""

from __future__ import annotations

import torch

from recray.errors import SettingsError


def device(setting: str, *, gpu: bool) -> torch.device:
    """The GPU of this process if `gpu`, else the CPU.

    setting : name of the setting that requests the GPU, for the error message

    Raises SettingsError where no GPU is available.
    """
    if not gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        problem = f"{setting} asks for a GPU, but torch {torch.__version__} sees none"
        raise SettingsError(problem, "install a CUDA build of torch and its driver, or use the CPU")
    return torch.device("cuda", torch.cuda.current_device())
