"""Check a checkpoint on disk before anything is loaded from it.

Reads headers and the small scale tensors only, so it takes seconds where loading takes minutes.
Everything it refuses would otherwise load and compute noise: vLLM's loader copies what it finds and
leaves the initial value where it finds nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from moe_backend.checkpoint.dialects import (
    BF16,
    UNKNOWN,
    Dialect,
    Quantisation,
    TensorSpec,
    read_quantisation,
)
from moe_backend.checkpoint.layout import (
    DOWN,
    GATE,
    UP,
    ExpertModule,
    MoeLayer,
    expert_count,
    find_moe_layers,
)
from moe_backend.checkpoint.reader import Checkpoint, CheckpointError
from moe_backend.formats.checks import expect_positive

AGAIN = "Download the checkpoint again, or convert it again (`moe-backend convert`)."


def preflight(path: str | Path) -> list[str]:
    """Check files, expert counts and scales of the checkpoint in directory `path`.

    Not checked: the values of codes and of E4M3 block scales (gigabytes; the engine checks them
    once they are loaded), anything but routed experts, and experts in a quantisation of another
    kind.

    Returns:
        what was found, one short sentence each.

    Raises:
        CheckpointError: the first thing found wrong, by tensor or file.
    """
    return check(Checkpoint.open(path))


def check(checkpoint: Checkpoint) -> list[str]:
    """`preflight` of a checkpoint whose headers have been read."""
    layers = find_moe_layers(checkpoint.tensors)
    files = len(checkpoint.files)
    facts = [f"{files} file(s), {len(checkpoint.tensors)} tensors, sizes match the headers"]
    if not layers:
        return [*facts, "no routed experts"]
    count = check_experts(checkpoint, layers)
    facts.append(f"{len(layers)} MoE layer(s) of {count} experts")
    return facts + _check_weights(checkpoint, layers)


def check_experts(checkpoint: Checkpoint, layers: tuple[MoeLayer, ...]) -> int:
    """Every layer has gate, up and down of as many experts as config.json says; returns the count.

    Raises:
        CheckpointError: a layer has more or fewer.
    """
    stated = expert_count(checkpoint.config)
    expected = stated[1] if stated else None
    where = f"config.json {stated[0]}" if stated else f"{layers[0].block}, the first MoE layer,"
    for layer in layers:
        for projection in (GATE, UP, DOWN):
            modules = [m for m in layer.modules if m.projection == projection]
            if not modules:
                raise CheckpointError(
                    f"{layer.block}: has no {projection} projection of any expert; gate, up and "
                    f"down are expected. {AGAIN}"
                )
            if layer.stacked:
                found = _stacked_count(checkpoint, modules[0])
                missing: set[int] = set()
            else:
                experts = layer.experts(projection)
                found = len(experts)
                missing = set(range(expected or max(experts) + 1)) - experts
            expected = found if expected is None else expected
            if found != expected or missing:
                gap = f" (missing: {_some(missing)})" if missing else ""
                raise CheckpointError(
                    f"{modules[0].name}: {found} experts found{gap}, {where} has {expected}. "
                    f"{AGAIN}"
                )
    assert expected is not None
    return expected


def _stacked_count(checkpoint: Checkpoint, module: ExpertModule) -> int:
    names = module.tensors
    name = names.get("weight") or names.get("weight_packed") or next(iter(names.values()))
    shape = checkpoint.tensors[name].shape
    return shape[0] if shape else 1


def _check_weights(checkpoint: Checkpoint, layers: tuple[MoeLayer, ...]) -> list[str]:
    quantisation = read_quantisation(checkpoint)
    seen: Counter[str] = Counter()
    scales = 0
    for layer in layers:
        expected: tuple[int, int] | None = None
        names = {module.name.rpartition(".")[2] for module in layer.modules}
        dialects = {name: quantisation.dialect_of(layer.block, name) for name in names}
        for module in layer.modules:
            dialect = dialects[module.name.rpartition(".")[2]]
            seen[dialect.name] += 1
            if dialect == UNKNOWN:
                continue
            rows, columns = _check_module(checkpoint, quantisation, dialect, module)
            size = (columns, rows) if module.projection == DOWN else (rows, columns)
            expected = expected or size
            if size != expected:
                raise CheckpointError(
                    f"{module.name}: weight [{rows}, {columns}] found, but "
                    f"{layer.modules[0].name} has intermediate size {expected[0]} and hidden size "
                    f"{expected[1]}. {AGAIN}"
                )
            scales += _check_values(checkpoint, dialect, module)
    return [_fact(name, seen[name], quantisation) for name in sorted(seen)] + (
        [f"{scales} scale tensor(s) finite and positive"] if scales else []
    )


def _check_module(
    checkpoint: Checkpoint, quantisation: Quantisation, dialect: Dialect, module: ExpertModule
) -> tuple[int, int]:
    """Names, dtypes and shapes of one module's tensors; returns the weight's rows and columns."""
    said = quantisation.source or "config.json, which has no quantization_config,"
    present = ", ".join(sorted(module.tensors))
    if dialect.codes not in module.tensors:
        raise CheckpointError(
            f"{module.name}.{dialect.codes}: not in the checkpoint, but {said} makes this expert "
            f"{dialect.name}; found here: {present}. {AGAIN}"
        )
    codes = checkpoint.tensors[module.tensors[dialect.codes]]
    if codes.dtype not in dialect.codes_dtypes:
        raise CheckpointError(
            f"{module.tensors[dialect.codes]}: dtype {_short(codes.dtype)} found, "
            f"{_shorts(dialect.codes_dtypes)} accepted, because {said} makes this expert "
            f"{dialect.name}. Correct config.json (the list of modules that are not quantised "
            f"included), or convert the checkpoint again."
        )
    dimensions = 2 if module.expert is not None else 3
    if len(codes.shape) != dimensions:
        raise CheckpointError(
            f"{module.tensors[dialect.codes]}: shape {codes.shape} found, {dimensions} dimensions "
            f"expected. {AGAIN}"
        )
    rows, columns = codes.shape[-2], dialect.columns(codes.shape[-1])
    if dialect.name.startswith("nvfp4") and columns % 16:
        raise CheckpointError(
            f"{module.tensors[dialect.codes]}: {columns} columns found, a multiple of 16 accepted."
        )
    stack = codes.shape[:1] if module.expert is None else ()
    for kind, spec in dialect.tensors(rows, columns).items():
        if kind not in module.tensors:
            raise CheckpointError(
                f"{module.name}.{kind}: not in the checkpoint, but {said} makes this expert "
                f"{dialect.name}; found here: {present}. {AGAIN}"
            )
        _check_tensor(checkpoint, module.tensors[kind], spec, stack, dialect)
    return rows, columns


def _check_tensor(
    checkpoint: Checkpoint, name: str, spec: TensorSpec, stack: tuple[int, ...], dialect: Dialect
) -> None:
    info = checkpoint.tensors[name]
    if info.dtype not in spec.dtypes:
        raise CheckpointError(
            f"{name}: dtype {_short(info.dtype)} found, {_shorts(spec.dtypes)} accepted. {AGAIN}"
        )
    accepted = {(*stack, *spec.shape)}
    if spec.shape in ((), (1,)):
        # One number for all experts is spread over them (vLLM `models/step3p5.py`).
        accepted |= {stack, (*stack, 1), (), (1,)}
    if info.shape not in accepted:
        raise CheckpointError(
            f"{name}: shape {info.shape} found, {(*stack, *spec.shape)} expected for "
            f"{dialect.name}. {AGAIN}"
        )


def _check_values(checkpoint: Checkpoint, dialect: Dialect, module: ExpertModule) -> int:
    """Values of the module's small scales; returns how many tensors were read."""
    small = dialect.tensors(16, 16).keys() - {dialect.codes, "weight_scale"}
    for kind in sorted(small):
        name = module.tensors[kind]
        try:
            expect_positive(name, checkpoint.load(name))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    return len(small)


def _fact(name: str, modules: int, quantisation: Quantisation) -> str:
    if name == UNKNOWN.name:
        return f"{modules} expert projection(s) in {quantisation.method}: not checked"
    with_scales = "" if name == BF16.name else ", each with its scales"
    return f"{modules} expert projection(s) in {name}{with_scales}"


def _some(numbers: set[int]) -> str:
    shown = sorted(numbers)
    return ", ".join(map(str, shown[:8])) + (", ..." if len(shown) > 8 else "")


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _shorts(dtypes: tuple[object, ...]) -> str:
    return " or ".join(map(_short, dtypes))
