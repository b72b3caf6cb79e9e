"""Accuracy of a checkpoint on held-out prompts, in every number format and with every mistake."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tasks
import torch
from data import IGNORE, Rows, load_tokenizer, pack
from model import MISTAKES, MODES, TinyStep
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor


@torch.inference_mode()
def answer_logits(
    model: TinyStep, rows: Rows, mode: str = "bf16", batch: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the answer tokens [A, vocab], the right tokens [A], their samples [A]."""
    device = model.lm_head.weight.device
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    model.set_mode(mode)
    for start in range(0, len(rows), batch):
        ids, positions, documents, targets = rows.take(slice(start, start + batch), device)
        answers = targets != IGNORE
        logits = model(ids, positions, documents)[answers].float()
        parts.append((logits, targets[answers], documents[answers]))
    model.set_mode("bf16")
    logits, tokens, owners = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits, tokens, owners


def score(
    samples: Sequence[tasks.Sample], logits: Tensor, tokens: Tensor, owners: Tensor
) -> dict[str, float]:
    """Share of the samples whose greedy completion, with its end token, is the answer.

    Greedy decoding gives the answer exactly when each token of the answer has the largest logit
    after the tokens before it, so one pass over prompt and answer decides.
    """
    right = torch.ones(len(samples), dtype=torch.bool, device=logits.device)
    right[owners[logits.argmax(-1) != tokens]] = False
    verdicts = right.tolist()
    total = Counter(task for task, _, _ in samples)
    good = Counter(task for (task, _, _), ok in zip(samples, verdicts, strict=True) if ok)
    shares = {task: good[task] / total[task] for task in tasks.TASKS if total[task]}
    return {"all": sum(verdicts) / len(samples), **shares}


def report(
    model: TinyStep, samples: Sequence[tasks.Sample], tokenizer: Tokenizer, modes: Sequence[str]
) -> None:
    """Print one line for each mode: right answers, and how far the logits are from bf16's."""
    rows = pack(samples, tokenizer)
    exact, tokens, owners = answer_logits(model, rows)
    exact = exact - exact.mean(-1, keepdim=True)
    print(f"{len(samples)} held-out prompts: right greedy answers, change of the logits, percent")
    print(" " * 22 + "".join(f"{name:>9}" for name in ("all", *tasks.TASKS, "logits")))
    for mode in modes:
        logits, _, _ = answer_logits(model, rows, mode)
        shares = score(samples, logits, tokens, owners)
        logits = logits - logits.mean(-1, keepdim=True)
        change = ((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).mean().item()
        print(f"{mode:>22}" + "".join(f"{100 * x:9.2f}" for x in (*shares.values(), change)))


def load(folder: Path, device: torch.device) -> TinyStep:
    """The model of a checkpoint folder."""
    model = TinyStep(json.loads((folder / "config.json").read_text()))
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent
    parser.add_argument("--checkpoint", type=Path, default=here / "checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modes", nargs="+", default=[*MODES, *MISTAKES])
    args = parser.parse_args()

    model = load(args.checkpoint, torch.device(args.device))
    tokenizer = load_tokenizer(args.checkpoint)
    samples = tasks.held_out(args.samples, args.seed)
    report(model, samples, tokenizer, args.modes)


if __name__ == "__main__":
    main()
