"""Train the tiny Step-3.5 model and write a checkpoint that vLLM loads.

The first part of the training is plain bf16. In the last part each step computes the experts in
one of the number formats of `model.MODES`, picked at random, so that the answers survive FP8 and
NVFP4 experts. The router biases are moved towards even use of the experts, as in DeepSeek-V3.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import model as model_module
import quant
import tasks
import torch
import torch.nn.functional as F
from data import IGNORE, build_tokenizer, pack
from evaluate import answer_logits, load, report, score
from model import MISTAKES, MODES, Config, MoE, TinyStep
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT = Path(__file__).parent / "checkpoint"
FP32_TENSORS = ("moe.gate.weight", "moe.router_bias")  # vLLM computes the router in fp32
QUANT_SHARES = (0.3, 0.05, 0.1, 0.15, 0.4)  # of MODES, in the last part


def initialise(model: TinyStep, gain: float) -> dict[str, float]:
    """Start the experts of the clamped layers so that most activations reach the clamp.

    Their down projections are smaller in turn, and get a part common to all inner channels, so
    that a constant added to the activations (the "+1" of "swigluoai") does not average out.
    Returns the scale of each scaled parameter by name; the learning rate follows it.
    """
    scales: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE) and module.limit:
            scales[f"{name}.gate_proj.weight"] = scales[f"{name}.up_proj.weight"] = gain
            scales[f"{name}.down_proj.weight"] = 1 / module.limit**2
    with torch.no_grad():
        for name, scale in scales.items():
            weight = model.get_parameter(name)  # [E, out, in]
            if name.endswith("down_proj.weight"):
                weight += torch.randn(weight.shape[1], 1) * weight.std()
            weight *= scale
    return scales


def parameter_groups(model: TinyStep, scales: dict[str, float], args: argparse.Namespace) -> list:
    """One optimizer group for each scale: all parameters learn at the same relative rate."""
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(scales.get(name, 1.0), []).append(parameter)
    return [
        {"params": params, "scale": scale, "weight_decay": args.decay / scale}
        for scale, params in groups.items()
    ]


@torch.no_grad()
def balance(model: TinyStep, rate: float) -> None:
    """Raise the router bias of experts used less than the mean, lower that of the others."""
    for moe in model.moe_layers():
        assert moe.chosen is not None
        load_of = moe.chosen.float().mean(0)
        moe.router_bias += rate * torch.sign(load_of.mean() - load_of)


def save(model: TinyStep, folder: Path) -> None:
    """Write model.safetensors: bf16, but for the router."""
    state = {
        name: tensor.detach().to(
            "cpu", torch.float32 if name.endswith(FP32_TENSORS) else torch.bfloat16
        )
        for name, tensor in model.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def prepare(config: Config, folder: Path, seed: int) -> None:
    """Write everything of the checkpoint but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        if folder.resolve() != CHECKPOINT.resolve():
            shutil.copy(CHECKPOINT / name, folder / name)
    build_tokenizer(config["vocab_size"], seed).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    with (folder / "held_out.jsonl").open("w") as lines:
        for task, prompt, text in tasks.held_out(500):
            lines.write(json.dumps({"task": task, "prompt": prompt, "answer": text}) + "\n")


@contextmanager
def progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """Yield `show(step, line)`: a rich progress bar, or plain prints without rich."""
    try:
        from rich.progress import Progress
    except ImportError:
        yield lambda step, line: print(line, flush=True) if line else None
        return
    with Progress() as bar:
        task = bar.add_task("training", total=total)

        def show(step: int, line: str) -> None:
            bar.update(task, completed=step)
            if line:
                bar.console.print(line)

        yield show


def train(args: argparse.Namespace) -> TinyStep:
    """Train, write the checkpoint to `args.out` and return the model read back from it."""
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    device = torch.device(args.device)
    config: Config = json.loads((CHECKPOINT / "config.json").read_text())
    prepare(config, args.out, args.seed)
    tokenizer = build_tokenizer(config["vocab_size"], args.seed)
    if args.compile:
        for module, name in (
            (model_module, "swiglu"),
            (quant, "fp8_weight"),
            (quant, "fp8_activation"),
            (quant, "nvfp4_weight"),
            (quant, "nvfp4_activation"),
        ):
            setattr(module, name, torch.compile(getattr(module, name)))

    began = time.monotonic()
    stream = tasks.samples(args.seed, held_out=False)
    rows = pack(list(itertools.islice(stream, args.pool)), tokenizer).to(device)
    checks = tasks.held_out(1000, seed=args.seed + 1)
    check_rows = pack(checks, tokenizer)
    print(f"{args.pool} samples in {len(rows)} rows, {time.monotonic() - began:.0f} s")

    model = TinyStep(config)
    scales = initialise(model, args.gain)
    model.to(device)
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, scales, args), betas=(0.9, 0.98), fused=device.type == "cuda"
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    began = time.monotonic()
    loss_sum = torch.zeros((), device=device)
    with progress(args.steps) as show:
        for step in range(args.steps):
            minutes = (time.monotonic() - began) / 60
            done = max(step / args.steps, minutes / args.minutes)
            if done >= 1:
                break
            rate = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate * group["scale"]
            quantised = done > args.quant_from
            mode = random.choices(MODES, QUANT_SHARES)[0] if quantised else "bf16"
            model.set_mode(mode)

            index = torch.randint(len(rows), (args.batch,), device=device, generator=generator)
            ids, positions, documents, targets = rows.take(index, device)
            logits = model(ids, positions, documents)
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            balance(model, args.balance * rate)
            loss_sum += loss.detach()

            line = ""
            if (step + 1) % args.every == 0:
                mean, loss_sum = loss_sum.item() / args.every, torch.zeros_like(loss_sum)
                line = f"step {step + 1}  {minutes:.1f} min  loss {mean:.4f}"
                for mode in ("bf16", "nvfp4-a4") if quantised else ("bf16",):
                    shares = score(checks, *answer_logits(model, check_rows, mode))
                    line += f"  {mode} " + " ".join(f"{k} {100 * v:.1f}" for k, v in shares.items())
            show(step + 1, line)
    save(model, args.out)
    return load(args.out, device)


@torch.inference_mode()
def statistics(model: TinyStep, rows_of: tuple[Tensor, ...]) -> None:
    """Print how evenly the experts are used and how often the clamp is reached."""
    seen: dict[int, Tensor] = {}
    hooks = [
        moe.register_forward_pre_hook(lambda m, inputs: seen.__setitem__(id(m), inputs[0]))
        for moe in model.moe_layers()
    ]
    ids, positions, documents, _ = rows_of
    model(ids, positions, documents)
    for hook in hooks:
        hook.remove()
    real = documents.flatten() >= 0
    for moe in model.moe_layers():
        assert moe.chosen is not None
        chosen, x = moe.chosen[real], seen[id(moe)][real]
        used = ", ".join(f"{100 * share:.0f}" for share in chosen.float().mean(0) / moe.top_k)
        line = f"experts used, percent: {used}; router bias {moe.router_bias.min():.3f}"
        line += f" to {moe.router_bias.max():.3f}"
        if moe.limit:
            gate = F.silu(x.float() @ moe.gate_proj.weight.mT)[chosen.T]
            up = (x.float() @ moe.up_proj.weight.mT)[chosen.T]
            line += f"; clamped: gate {100 * (gate > moe.limit).float().mean():.1f} %"
            line += f", up {100 * (up.abs() > moe.limit).float().mean():.1f} %"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=6400)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop then at the latest")
    parser.add_argument("--batch", type=int, default=256, help="rows of 64 tokens")
    parser.add_argument("--pool", type=int, default=1_200_000, help="training samples")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.2, help="weight decay")
    parser.add_argument("--gain", type=float, default=16.0, help="of the clamped experts, at start")
    parser.add_argument("--balance", type=float, default=2e-3, help="step of the router biases")
    parser.add_argument("--quant-from", type=float, default=0.5, help="share of the training")
    parser.add_argument("--every", type=int, default=1000, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the elementwise parts"
    )
    args = parser.parse_args()

    began = time.monotonic()
    model = train(args)
    print(f"trained in {(time.monotonic() - began) / 60:.1f} min")
    tokenizer = build_tokenizer(model.lm_head.weight.shape[0], args.seed)
    samples = tasks.held_out(2000, seed=1)
    statistics(model, pack(samples, tokenizer).take(slice(None), torch.device(args.device)))
    report(model, samples, tokenizer, (*MODES, *MISTAKES))


if __name__ == "__main__":
    main()
