"""Several processes, one program: joining them, and what a host needs of arrays that are spread over all.

Every process runs the same code on the same prompts and holds the parts of the global arrays that live on its devices.
"""

import json
import os
import re
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from dancegrpo_jax.config import ConfigError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT = 60  # seconds after which a silent process counts as dead, and the others exit


def initialize() -> None:
    """Joins the processes of a pod; to be called before anything else of jax. Alone, it does nothing.

    TPU pods, GKE and SLURM are recognised by jax. Elsewhere each process gets VARIABLES: the address host:port of
    process 0, their number, and its own number.

    Raises: ConfigError for variables that are incomplete or no numbers; RuntimeError if the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    settings = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    options = {"heartbeat_timeout_seconds": HEARTBEAT}
    if settings:
        if missing := [name for name in VARIABLES if name not in settings]:
            raise ConfigError(f"{', '.join(settings)} set, but not {', '.join(missing)}; several processes need all three")
        address, *numbers = (settings[name] for name in VARIABLES)
        if not all(number.isdigit() for number in numbers) or ":" not in address:
            raise ConfigError(f"{', '.join(f'{name}={value}' for name, value in settings.items())}: expected host:port "
                              "and two numbers")
        jax.distributed.initialize(address, *map(int, numbers), **options)
        return
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        # What jax says when it recognises nothing, and when it is in use already, as for a second run in a notebook.
        if not re.search("coordinator_address should be defined|must be called before any JAX calls", str(error)):
            raise


def leave(error: BaseException) -> None:
    """Ends this process at once, with status 1, if it is one of several; alone, it does nothing.

    The others cannot go on without it and exit within HEARTBEAT seconds. jax's own way out would wait for them.
    """
    if jax.process_count() == 1:
        return
    cause = error
    while cause is not None and not isinstance(cause, jax.errors.JaxRuntimeError):
        cause = cause.__cause__
    what = "another process was lost, or a device failed" if cause else type(error).__name__
    print(f"error: process {jax.process_index()} of {jax.process_count()}: {what}: {' '.join(str(error).split())[:400]}; the "
          "same command resumes from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(1)


def fetch(tree):
    """numpy copies of arrays, wherever their parts are. All processes must call it alike, and all get the values."""
    def whole(leaf):
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf)
    return jax.tree.map(whole, tree)


def on_primary(work: Callable):
    """Runs `work()` on process 0 and gives its JSON-like result to all, so that every process decides alike."""
    if jax.process_count() == 1:
        return work()
    text = json.dumps(work() if jax.process_index() == 0 else None).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    data = np.frombuffer(text[:size].ljust(size), dtype=np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(data)).decode())
