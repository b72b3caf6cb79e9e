"""Measure layers: ours and the rivals on the same inputs, each checked in the same run."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import subprocess
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from moe_backend import __version__
from moe_backend.bench.floor import Rates, floor_us
from moe_backend.bench.inputs import Inputs, make_inputs
from moe_backend.bench.measure import Result, measure, quick_milliseconds, reason
from moe_backend.bench.report import Row
from moe_backend.bench.shapes import Shape
from moe_backend.engines import vllm_rivals
from moe_backend.engines.vllm_rivals import Missing
from moe_backend.formats import Weights
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.registry import Kernel, LayerConfig

Cell = tuple[str, int]  # how L2 was filled, tokens
Results = dict[Cell, dict[str, Result]]  # by name
Keep = Callable[[list[Row]], None]


class Bench:
    """One run over any number of layers.

    Args:
        wanted: names of the rivals to measure.
        say: told what is being measured now.
        caches: what L2 holds before each replay, of `measure.CACHES`; a row for each. Where a rival
            has a choice it is made by the first.
    """

    def __init__(
        self,
        rates: Rates,
        wanted: Collection[str],
        say: Callable[[str], None],
        device: str = "cuda",
        caches: Sequence[str] = ("written",),
    ) -> None:
        self.rates = rates
        self.caches = tuple(dict.fromkeys(caches))
        self.wanted = wanted
        self.say = say
        self.device = device
        self.common: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
            "rates": asdict(rates),
        }
        self._rivals: dict[tuple[Shape, str], Results] = {}

    def rows(self, shape: Shape, routing: str, keep: Keep = lambda rows: None) -> list[Row]:
        """Measure one layer at all its token counts.

        Args:
            keep: given the rows as they are, once ours is measured and then after each rival.
        """
        self.say(f"{shape.name} {routing}: weights")
        weights = shape.weights(self.device)
        inputs = self._inputs(shape, weights, routing)
        floors = {
            t: round(floor_us(shape, given.topk_ids, self.rates), 2) for t, given in inputs.items()
        }
        rows = {
            (cache, t): Row(shape.name, t, routing, floor, cache=cache, **self.common)
            for cache in self.caches
            for t, floor in floors.items()
        }

        def told(results: Results, suffix: str) -> None:
            _fill(rows, results, suffix)
            keep(list(rows.values()))

        self._ours(shape, weights, inputs, rows)
        keep(list(rows.values()))
        if shape.stored == "padded":
            self._rivals_on(shape, routing, lambda found: told(found, ""), weights, inputs)
        if shape.rivals_of is not None:
            del weights, inputs
            free()
            suffix = f" ({shape.stored})"
            self._rivals_on(shape.rivals_of, routing, lambda found: told(found, suffix))
        return list(rows.values())

    def _inputs(self, shape: Shape, weights: Weights, routing: str) -> dict[int, Inputs]:
        return {t: make_inputs(shape, weights, t, routing, self.device) for t in shape.tokens}

    def _ours(
        self, shape: Shape, weights: Weights, inputs: dict[int, Inputs], rows: dict[Cell, Row]
    ) -> None:
        layer = shape.layer(self.device)
        ours = FusedMoE(layer, weights)
        kernel = ours.selection.kernel
        for tokens, given in inputs.items():
            self.say(f"{shape.name}: ours, {tokens} tokens")
            for cache, result in measure(ours, given, caches=self.caches).items():
                row = rows[cache, tokens]
                row.ours_us, row.rel_l2 = result.us, result.rel_l2
                row.kernel = f"{kernel.name}: {choice_of(kernel, layer, tokens)}".rstrip(": ")
                if result.note:
                    row.notes["ours"] = result.note

    def _rivals_on(
        self,
        shape: Shape,
        routing: str,
        told: Callable[[Results], None],
        weights: Weights | None = None,
        inputs: dict[int, Inputs] | None = None,
    ) -> None:
        """The rivals' results, measured once: an even split asks for the padded layer's too.

        Args:
            told: given all results so far, after each rival.
        """
        if (shape, routing) in self._rivals:
            told(self._rivals[shape, routing])
            return
        if not vllm_rivals.installed() or not self.wanted:
            return
        if weights is None or inputs is None:
            weights = shape.weights(self.device)
            inputs = self._inputs(shape, weights, routing)
        self._rivals[shape, routing] = self._measured(shape, weights, inputs, told)

    def _measured(
        self,
        shape: Shape,
        weights: Weights,
        inputs: dict[int, Inputs],
        told: Callable[[Results], None],
    ) -> Results:
        results: Results = {(cache, t): {} for cache in self.caches for t in inputs}
        layer = shape.layer(self.device)
        quick = partial(quick_milliseconds, cache=self.caches[0])

        def note(name: str, tokens: int, found: dict[str, Result]) -> None:
            for cache, result in found.items():
                results[cache, tokens][name] = result

        def failed(why: str) -> dict[str, Result]:
            return dict.fromkeys(self.caches, Result(None, None, why))

        offers = vllm_rivals.build(layer, weights, self.wanted, quick)
        for rival in offers:
            for tokens, given in inputs.items():
                if isinstance(rival, Missing):
                    note(rival.name, tokens, failed(rival.reason))
                    continue
                self.say(f"{shape.name}: {rival.name}, {tokens} tokens")
                try:
                    call, what = rival.fit(given.args)
                except Exception as error:  # the other backends are still measured
                    note(rival.name, tokens, failed(reason(error)))
                    continue
                note(rival.name, tokens, measure(call, given, what, self.caches))
                del call
            del rival
            free()
            told(results)
        return results


def _fill(rows: dict[Cell, Row], results: Results, suffix: str) -> None:
    for cell, by_name in results.items():
        for name, result in by_name.items():
            rows[cell].rivals[name + suffix] = result.us
            if result.note:
                rows[cell].notes[name + suffix] = result.note


def choice_of(kernel: Kernel, layer: LayerConfig, tokens: int) -> str:
    """What our kernel does for so many tokens; empty where it has one way only."""
    if kernel.name != "hopper":
        return ""
    from moe_backend.kernels.hopper.choose import choose

    return str(choose(layer, tokens))


def free() -> None:
    """Give back what the last backend held."""
    gc.collect()
    torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    """Of everything that the times depend on."""
    found = {"moe-backend": __version__, "torch": torch.__version__}
    for name in ("triton", "vllm", "humming-kernels", "flashinfer-python"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        driver = []
    return {**found, "driver": driver[0] if driver else "unknown"}
