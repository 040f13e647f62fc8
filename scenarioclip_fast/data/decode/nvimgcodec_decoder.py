"""Decoding with nvImageCodec, which reports bad images one by one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from scenarioclip_fast.data.decode.base import DecodeError
from scenarioclip_fast.data.decode.run_decoder import RunDecoder
from scenarioclip_fast.requirements import require


class NvimgcodecDecoder(RunDecoder):
    """Decode JPEGs with nvImageCodec, on the GPU or with its own libjpeg-turbo on the CPU.

    The library writes the cause of a bad image to stderr and returns no pixels for it.
    """

    name = "nvimgcodec"
    library = "nvImageCodec"
    module = "nvidia.nvimgcodec"

    def _open(self) -> None:
        codec = require(self.module)
        options: dict[str, Any] = {
            # It warns of as many threads as cores; 0 is its default.
            "max_num_cpu_threads": self.threads if self.threads < (os.cpu_count() or 1) else 0,
            # Otherwise chroma differs from libjpeg-turbo's.
            "options": ":fancy_upsampling=1",
        }
        if self.device.type == "cuda":
            index = self.device.index
            options["device_id"] = torch.cuda.current_device() if index is None else index
        else:
            options["device_id"] = codec.NVIMGCODEC_DEVICE_CPU_ONLY
            options["backends"] = [codec.Backend(codec.BackendKind.CPU_ONLY)]
        self._decoder = codec.Decoder(**options)
        self._params = codec.DecodeParams(
            apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB, sample_format=codec.SampleFormat.I_RGB
        )

    def _run(self, images: list[bytes]) -> Sequence[Tensor | DecodeError]:
        if self._decoder is None:
            raise ValueError("this decoder is closed: create a new one")
        codec = require(self.module)
        streams = [codec.CodeStream(data) for data in images]
        if self.device.type == "cpu":
            decoded = self._decoder.decode(streams, params=self._params)
            return [_failed() if image is None else torch.from_numpy(np.array(image)) for image in decoded]
        stream = torch.cuda.current_stream(self.device)
        decoded = self._decoder.decode(streams, params=self._params, cuda_stream=stream.cuda_stream)
        copies = [
            _failed() if image is None else from_dlpack(image).clone(memory_format=torch.contiguous_format)
            for image in decoded
        ]
        stream.synchronize()  # before the library frees its images
        return copies

    def _close(self) -> None:
        """Release the library's threads and memory."""
        self._decoder = None


def _failed() -> DecodeError:
    return DecodeError("undecodable", "nvImageCodec: Failed to decode the image; stderr has the cause")
