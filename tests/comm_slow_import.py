"""An opener whose libraries take a while to import, as vLLM does."""

import functools
import time

import comm_faults

from moe_backend.comm import Collective, World


@functools.cache
def prepare(world: World) -> None:
    time.sleep(2)


def healthy(world: World) -> Collective:
    prepare(world)
    return comm_faults.healthy(world)
