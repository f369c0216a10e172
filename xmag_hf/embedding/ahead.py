"""Run an iterator in a thread, a few items ahead of whoever takes them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def ahead(items: Generator[Item, None, None], depth: int) -> Iterator[Item]:
    """The items, made in a thread that may be `depth` of them ahead.

    Args:
        items: Closed, in its thread, when the taker stops early.
        depth: At least 1.

    Yields:
        The items, in order.

    Raises:
        BaseException: What `items` raised, where it raised it.
    """
    passed: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                passed.put(item, timeout=POLL_SECONDS)
                return

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    break
            items.close()
        except BaseException as caught:  # noqa: BLE001 - raised again by the taker
            error = caught
        put(_End(error))

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := passed.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()
