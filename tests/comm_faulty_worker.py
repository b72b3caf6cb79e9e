"""For --worker-extension-cls: vLLM imports it in each worker before the worker builds any group."""

import os

import torch
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

_all_reduce = _CPUSHMDistributed.all_reduce


class FaultyWorker:
    """The fault is planted by the import."""


def wrong_sign_on_rank_1(self, tensor, group=None):
    _all_reduce(self, tensor, group)
    if torch.distributed.get_rank() == 1:
        tensor.neg_()


if os.environ.get("MOE_BACKEND_TEST_FAULT"):
    _CPUSHMDistributed.all_reduce = wrong_sign_on_rank_1
