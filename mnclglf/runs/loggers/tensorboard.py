"""TensorBoard: event files in RUN/tensorboard, which need no server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mnclglf.runs.loggers import Opening


class TensorBoard:
    """Writes RUN/tensorboard; a step of a killed process that is taken again replaces the old one."""

    def __init__(self, opening: Opening) -> None:
        start = opening.start
        self.writer = SummaryWriter(
            str(opening.folder / "tensorboard"), purge_step=None if start is None else start + 1
        )
        # The thread that writes hands an error on to the next call, so that Python need not print it, too.
        with suppress(AttributeError):  # in another version of TensorBoard
            thread: Any = self.writer._get_file_writer().event_writer._async_writer._worker  # pyright: ignore
            thread._invoke_excepthook = lambda _: None
        if start == 0:
            settings = {
                name: value if isinstance(value, bool | int | float) else str(value)
                for name, value in opening.settings.items()
            }
            # Not add_hparams, which writes them as another run, into a folder of its own.
            for part in hparams(settings, {"loss": None, "top1/knn/pretrained": None, "top1/linear/pretrained": None}):
                self.writer._get_file_writer().add_summary(part)  # pyright: ignore[reportPrivateUsage]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, images: NDArray[np.uint8]) -> None:
        self.writer.add_images(name, images, step, dataformats="NHWC")

    def close(self) -> None:
        self.writer.close()
