"""Two processes that torch.distributed joins, forked from one interpreter: torchrun would make the imports three times."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import implicitdl

FOLDERS = [str(Path(implicitdl.__file__).parents[1]), str(Path(__file__).parent)]
FORK = """
import os, sys, traceback

children = []
for rank in ("0", "1"):
    child = os.fork()
    if child == 0:
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
        code = 1
        try:
            code = int(work() or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    children.append(child)
raise SystemExit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def joined(code: str, *arguments: str) -> str:
    """What the two print; the code makes the imports and defines work(), whose arguments begin at sys.argv[2]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(FOLDERS)}
    command = [sys.executable, "-c", code + FORK, port, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
