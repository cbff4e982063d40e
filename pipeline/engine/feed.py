"""Micro-batches on their way to the device: the next one is copied while this one is computed."""

import torch

from pipeline.clip import ClipBatch
from pipeline.data.loader import Loader
from pipeline.errors import JepaError


class DeviceFeed:
    """Hands out a loader's micro-batches on a device.

    On a GPU the copy of the next one runs on a stream of its own: `ahead`, called as soon as a
    micro-batch's forward pass has been queued, takes the next one from the loader and starts its
    copy from page-locked memory, and `take` makes the computing stream wait for it, not the host.
    On a CPU there is nothing to copy, and `ahead` does nothing.

    Args:
        loader: Where micro-batches come from.
        device: Where they go.

    Attributes:
        wait_seconds: How long the loader was waited for, for the micro-batch taken last. On a GPU
            that is an upper bound of what the device lost, since it computes meanwhile.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.wait_seconds = 0.0
        self._loader, self._device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: ClipBatch | Exception | None = None
        self._next_wait_seconds = 0.0

    def take(self) -> ClipBatch:
        """The next micro-batch, on the device.

        Raises:
            StopIteration: The plans are done.
            DataError: The loader gave up.
        """
        if self._next is None:
            self._fetch()
        batch, self._next = self._next, None
        self.wait_seconds = self._next_wait_seconds
        if isinstance(batch, Exception):
            raise batch
        if batch is None:
            raise RuntimeError("nothing was fetched")
        if self._stream is not None:
            self._hand_over(batch, self._stream)
        return batch

    def ahead(self) -> None:
        """Fetches the next micro-batch, if that can go on beside what has been queued.

        What goes wrong is kept until the micro-batch is asked for: the step before it is whole.
        """
        if self._stream is not None and self._next is None:
            self._fetch()

    def _fetch(self) -> None:
        try:
            batch = next(self._loader)
        except (StopIteration, JepaError) as error:
            self._next = error
            return
        finally:
            self._next_wait_seconds = self._loader.wait_seconds
        if self._stream is None:
            self._next = batch.to(self._device)
            return
        with torch.cuda.stream(self._stream):
            self._next = batch.to(self._device)

    def _hand_over(self, batch: ClipBatch, stream: torch.cuda.Stream) -> None:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(stream)
        for tensor in batch.tensors():
            # Its memory belongs to the copying stream's pool: it must not be given out again
            # before the computing stream is done with it.
            tensor.record_stream(computing)
