"""Decoding with DALI: on a GPU, only JPEG bytes are copied to the device, and pixels stay there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from scenarioclip_fast.data.decode.run_decoder import RunDecoder
from scenarioclip_fast.requirements import require


class DaliDecoder(RunDecoder):
    """Decode with a DALI pipeline that only decodes JPEGs; `render_views` does the rest. One bad JPEG fails a run."""

    name = "dali"
    library = "DALI"
    module = "nvidia.dali"

    def _open(self) -> None:
        require(self.module)
        self._pipeline: Any = None
        self._capacity = 0

    def _cause(self, error: Exception) -> str:
        text = str(error)  # the pipeline's trace precedes the cause
        cause = text.partition("encountered:")[2].strip() or text
        return cause.splitlines()[0].rstrip(" :")

    def _run(self, images: list[bytes]) -> list[Tensor]:
        if self._pipeline is None or len(images) > self._capacity:
            self._build(max(len(images), self._capacity))
        try:
            self._pipeline.feed_input("jpeg", [np.frombuffer(data, np.uint8) for data in images])
            (out,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # DALI documents it as invalid after a failed run
            raise
        # Copy (as `at` does): the next run reuses the memory.
        if self.device.type == "cpu":
            return [torch.from_numpy(out.at(i)) for i in range(len(images))]
        copies = [from_dlpack(out[i]).clone() for i in range(len(images))]
        torch.cuda.current_stream(self.device).synchronize()
        return copies

    def _build(self, capacity: int) -> None:
        dali = require(self.module)
        fn, types = dali.fn, dali.types
        on_gpu = self.device.type == "cuda"
        index = self.device.index
        device_id = (torch.cuda.current_device() if index is None else index) if on_gpu else None
        pipeline = dali.Pipeline(capacity, self.threads, device_id, prefetch_queue_depth=1, exec_dynamic=True)
        with pipeline:
            jpeg = fn.external_source(name="jpeg", device="cpu", dtype=types.UINT8, ndim=1)
            image = fn.decoders.image(
                jpeg,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            pipeline.set_outputs(image)
        pipeline.build()
        self._pipeline, self._capacity = pipeline, capacity

    def _close(self) -> None:
        """Destroy the pipeline and release the memory of DALI's pools."""
        if self._pipeline is not None:
            self._pipeline = None
            require(self.module).backend.ReleaseUnusedMemory()
