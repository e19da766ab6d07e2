"""A worker process of the local runner: Beam's own, but silent, and gone when its parent is."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time


def _live_with(parent: int, lifeline: str) -> None:
    """Ends this process when its parent has ended, or has removed a file."""
    while os.getppid() == parent and os.path.exists(lifeline):
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    watch = threading.Thread(target=_live_with, args=(os.getppid(), sys.argv[1]), daemon=True)
    watch.start()
    # Beam writes what it is doing to the root logger; its errors reach the parent anyway.
    handler = logging.StreamHandler()
    handler.setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(handler)
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)


if __name__ == "__main__":
    main()
