"""Decoding on a GPU with torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scenarioclip_fast.data.decode.base import DecodeError
from scenarioclip_fast.data.decode.run_decoder import RunDecoder
from scenarioclip_fast.errors import UserError
from scenarioclip_fast.requirements import require


class TorchvisionDecoder(RunDecoder):
    """Decode JPEGs with torchvision's binding of nvJPEG, on a GPU only. One bad JPEG fails a run.

    torchvision repeats subsampled chroma where libjpeg-turbo and the other decoders interpolate it: at edges between
    saturated colours, pixels differ visibly. It decodes in the calling thread: `threads` has no effect.
    """

    name = "torchvision"
    library = module = "torchvision"

    def _open(self) -> None:
        if self.device.type != "cuda":
            raise UserError(
                f"decoder: torchvision decodes on a GPU, got the device {self.device}: choose another decoder, or run "
                "on a GPU"
            )
        require("torchvision.io")

    def _run(self, images: list[bytes]) -> Sequence[Tensor | DecodeError]:
        io = require("torchvision.io")
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]  # bytes are read-only
        # torchvision allocates on this stream and writes on its own, without waiting for earlier uses of the memory.
        torch.cuda.current_stream(self.device).synchronize()
        decoded = io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB, device=self.device)
        return [image.permute(1, 2, 0).contiguous() for image in decoded]

    def _close(self) -> None:
        """Do nothing: torchvision keeps its decoder until the process ends."""
