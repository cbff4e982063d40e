"""How the processes of a check talk: through the ranks' store, never by collectives.

A collective with a machine that hangs would hang all; a key in the store is there or it is not.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from launch.preflight.finding import Answer, Finding
from pipeline.environment import attempt
from pipeline.errors import PeerLostError
from pipeline.meeting import hosts_of, open_store, sign, wait_for
from pipeline.place import Launch

_TICK_SECONDS = 0.05
_LOST = (dist.DistStoreError, dist.DistNetworkError)


class Gathering:
    """All processes of a check; rank 0 serves it.

    Args:
        launch: This process's place.
        node: Its machine.
        deadline: Until when the master must be reached, on the monotonic clock.

    Raises:
        PeerLostError: The master cannot be reached, or its port is taken.
        UsageError: This rank was started twice.
    """

    def __init__(self, launch: Launch, node: str, deadline: float) -> None:
        self._launch = launch
        self.store = open_store(launch, deadline, f"preflight/{attempt()}")
        sign(self.store, launch)
        self.store.set(f"node/{launch.rank}", node)
        self._ended = threading.Event()
        if launch.rank == 0:
            threading.Thread(target=self._tick, name="clock", daemon=True).start()

    def missing(self, deadline: float) -> list[int]:
        """Ranks that did not come; rank 0 decides, the others hear it.

        Raises:
            PeerLostError: Rank 0 says nothing.
        """
        if self._launch.rank == 0:
            absent = wait_for(self.store, range(self._launch.world_size), deadline)
            self.store.set("absent", json.dumps(absent))
            return absent
        return json.loads(self._get("absent", deadline + 10.0))

    def hosts(self) -> dict[int, str]:
        """The machines of ranks, as far as they are known, present or not."""
        known = hosts_of(self.store, self._launch)
        for rank in range(self._launch.world_size):
            with contextlib.suppress(*_LOST):
                if self.store.check([f"node/{rank}"]):
                    known[rank] = self.store.get(f"node/{rank}").decode()
        return known

    def nodes(self) -> dict[int, str]:
        """The machine of every rank; all must have come."""
        return {
            rank: self.store.get(f"node/{rank}").decode() for rank in range(self._launch.world_size)
        }

    def clock_offset(self) -> float:
        """How far this machine's clock is before rank 0's, in seconds."""
        then = float(self.store.get("clock"))
        return time.time() - then

    def devices(self, own: str, deadline: float) -> dict[int, str]:
        """The kind of device that every rank will use; all must have come.

        Raises:
            PeerLostError: One of them says nothing.
        """
        self.store.set(f"device/{self._launch.rank}", own)
        ranks = range(self._launch.world_size)
        return {rank: self._get(f"device/{rank}", deadline).decode() for rank in ranks}

    def tell(self, answer: Answer) -> None:
        """Hands this process's findings to rank 0."""
        content = {
            "rank": answer.rank,
            "node": answer.node,
            "findings": [finding.to_dict() for finding in answer.findings],
        }
        self.store.set(f"answer/{answer.rank}", json.dumps(content, default=str))

    def answers(self, ranks: Iterable[int], deadline: float) -> dict[int, Answer]:
        """The findings of those processes that give them by the deadline."""
        found = {}
        for rank in ranks:
            with contextlib.suppress(*_LOST, PeerLostError):
                found[rank] = _answer(json.loads(self._get(f"answer/{rank}", deadline)))
        return found

    def verdict(self, code: int | None, deadline: float, *, others: int = 0) -> int:
        """Rank 0 says what all end with; the others hear it, so many of them.

        Raises:
            PeerLostError: Rank 0 says nothing.
        """
        if code is None:
            code = int(self._get("verdict", deadline))
            self.store.add("heard", 1)
            return code
        self.store.set("verdict", str(code))
        # The store ends with rank 0: not before the others have heard.
        until = min(deadline, time.monotonic() + 5.0)
        while time.monotonic() < until:
            if self.store.add("heard", 0) >= others:
                break
            time.sleep(_TICK_SECONDS)
        self._ended.set()
        return code

    def _get(self, key: str, deadline: float) -> bytes:
        left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
        try:
            self.store.wait([key], left)
            return self.store.get(key)
        except _LOST as error:
            raise PeerLostError(
                f"nothing came of `{key}` in time through the store of rank 0 at "
                f"{self._launch.master_address}"
            ) from error

    def _tick(self) -> None:
        store = self.store.clone()  # of its own: the other one may be waiting for a key
        while not self._ended.is_set():
            with contextlib.suppress(*_LOST):
                store.set("clock", repr(time.time()))
            self._ended.wait(_TICK_SECONDS)


def _answer(content: Mapping[str, Any]) -> Answer:
    return Answer(
        rank=int(content["rank"]),
        node=str(content["node"]),
        findings=tuple(Finding.from_dict(one) for one in content["findings"]),
    )
