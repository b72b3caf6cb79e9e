"""A plain PyTorch Step-3.5 decoder, small enough to read and to train in minutes.

It computes what vLLM's `model_executor/models/step3p5.py` computes, and its `state_dict` has the
tensor names of the published checkpoints, so the trained weights load into vLLM unchanged:

* RMSNorm weights are zero-centred: the factor is `1 + weight`;
* queries and keys are normalised per head, and each head's output is scaled by a sigmoid gate;
* sliding-window layers have their own number of heads, rope base and rotary share;
* the router scores experts with a sigmoid; a bias moves the choice of experts, not their weights;
* some layers clamp the activation of the experts ("swiglustep"), the others use plain SiLU.

Master weights are fp32 and are cast to the compute dtype where they are used. All experts are
computed for all tokens, which is simple and, at this size, fast.

Shapes: B rows, T positions, N = B T tokens, H hidden size, E experts, I expert width.
"""

from typing import Any

import quant
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = dict[str, Any]

# Number formats of the experts, and mistakes that a backend could make: kept here to measure what
# each one does to the answers.
MODES = ("bf16", "fp8", "fp8-a8", "nvfp4", "nvfp4-a4")
MISTAKES = ("no-clamp", "swigluoai", "swapped-gate-up", "no-router-bias")
MISTAKES += ("biased-router-weights", "no-router-scaling", "softmax-router")


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up in fp32, both clamped when `limit` is set (vLLM: `SwigluStepAndMul`)."""
    act, lin = F.silu(gate.float()), up.float()
    if limit:
        act, lin = act.clamp(max=limit), lin.clamp(-limit, limit)
    return (act * lin).to(gate.dtype)


def swigluoai(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """The other clamped SwiGLU; only to measure what mixing the two up would cost."""
    act, lin = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    return (act * torch.sigmoid(1.702 * act) * (lin + 1)).to(gate.dtype)


class Linear(nn.Linear):
    """Linear layer without bias; the weight is cast to the dtype of the input."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)
        nn.init.normal_(self.weight, std=width_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm over the last dimension, in fp32, with the factor 1 + weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return (normed * (1 + self.weight)).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with query/key norm, partial rotary and head-wise gates."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        kind, other = config["layer_types"][layer], config["attention_other_setting"]
        mine = other if kind == other["attention_type"] else config
        hidden, self.dim = config["hidden_size"], mine["head_dim"]
        self.heads, self.groups = mine["num_attention_heads"], mine["num_attention_groups"]
        self.window = config["sliding_window"] if kind == "sliding_attention" else None
        self.theta = config["rope_theta"][layer]
        self.rotary = int(self.dim * config["partial_rotary_factors"][layer])
        self.q_proj = Linear(hidden, self.heads * self.dim)
        self.k_proj = Linear(hidden, self.groups * self.dim)
        self.v_proj = Linear(hidden, self.groups * self.dim)
        self.o_proj = Linear(self.heads * self.dim, hidden)
        self.g_proj = Linear(hidden, self.heads)
        self.q_norm = Norm(self.dim, config["rms_norm_eps"])
        self.k_norm = Norm(self.dim, config["rms_norm_eps"])

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate the first `self.rotary` channels; x is [B, heads, T, dim], positions [B, T].

        Cosines and sines are rounded to the compute dtype, as vLLM's cache of them is.
        """
        exponent = torch.arange(0, self.rotary, 2, device=x.device) / self.rotary
        angle = (positions[..., None].float() / self.theta**exponent)[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        half = self.rotary // 2
        first, second, rest = x.split((half, half, self.dim - self.rotary), -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """x [B, T, H], positions and documents [B, T] -> [B, T, H]."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.dim))).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.groups, self.dim))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.groups, self.dim)).transpose(1, 2)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        distance = positions[:, :, None] - positions[:, None, :]
        mask = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0)
        if self.window:  # the window counts the token itself
            mask &= distance < self.window
        share = self.heads // self.groups
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)
        return self.o_proj((out * self.g_proj(x).sigmoid()[..., None]).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward layer: the dense layers and the shared expert; [..., H] -> [..., H]."""

    def __init__(self, hidden: int, width: int, limit: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(hidden, width), Linear(hidden, width)
        self.down_proj, self.limit = Linear(width, hidden), limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class Stack(nn.Module):
    """The weights of one projection of all experts: [E, out, in]."""

    def __init__(self, experts: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width_out, width_in) * width_in**-0.5)


class MoE(nn.Module):
    """The routed experts of one layer; [N, H] -> [N, H]."""

    router_bias: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["moe_intermediate_size"]
        experts, self.top_k = config["moe_num_experts"], config["moe_top_k"]
        self.scaling: float = config["moe_router_scaling_factor"]
        self.limit: float = config["swiglu_limits"][layer]
        self.gate = Linear(hidden, experts)
        self.gate_proj = Stack(experts, hidden, width)
        self.up_proj = Stack(experts, hidden, width)
        self.down_proj = Stack(experts, width, hidden)
        self.register_buffer("router_bias", torch.zeros(experts))
        self.mode = "bf16"
        self.chosen: Tensor | None = None  # [N, E] bool, which experts the last tokens went to

    def route(self, x: Tensor) -> Tensor:
        """Weight of each expert for each token, 0 for those not chosen: [N, H] -> [N, E] fp32."""
        logits = self.gate(x.float())
        scores = logits.softmax(-1) if self.mode == "softmax-router" else logits.sigmoid()
        bias = 0 if self.mode == "no-router-bias" else self.router_bias
        picked = (scores + bias).topk(self.top_k, -1).indices
        self.chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, picked, True)
        biased = self.mode == "biased-router-weights"
        weights = (scores + self.router_bias if biased else scores) * self.chosen
        scaling = 1.0 if self.mode == "no-router-scaling" else self.scaling
        return weights / weights.sum(-1, keepdim=True) * scaling

    def forward(self, x: Tensor) -> Tensor:
        weights = self.route(x)
        assert self.chosen is not None
        w1, w3, w2 = (p.weight.to(x.dtype) for p in (self.gate_proj, self.up_proj, self.down_proj))
        if self.mode.startswith("fp8"):
            w1, w3, w2 = (quant.fp8_weight(w) for w in (w1, w3, w2))
        elif self.mode.startswith("nvfp4"):
            w1, w3, w2 = (quant.nvfp4_weight(w) for w in (w1, w3, w2))
        if self.mode == "fp8-a8":
            x = quant.fp8_activation(x)
        elif self.mode == "nvfp4-a4":
            x = quant.nvfp4_activation(x, torch.ones_like(x, dtype=torch.bool))
        if self.mode == "swapped-gate-up":
            w1, w3 = w3, w1
        gate, up = x @ w1.mT, x @ w3.mT  # [E, N, I]
        if self.limit and self.mode == "swigluoai":
            inner = swigluoai(gate, up, self.limit)
        else:
            inner = swiglu(gate, up, 0.0 if self.mode == "no-clamp" else self.limit)
        if self.mode == "fp8-a8":
            inner = quant.fp8_activation(inner)
        elif self.mode == "nvfp4-a4":
            inner = quant.nvfp4_activation(inner, self.chosen.T[..., None])
        out = inner @ w2.mT  # [E, N, H]
        return (out.float() * weights.T[..., None]).sum(0).to(x.dtype)


class Layer(nn.Module):
    """Attention and feed-forward part, each behind a norm and added to its input."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden, eps), Norm(hidden, eps)
        self.self_attn = Attention(config, layer)
        limit = config["swiglu_limits_shared"][layer]
        self.moe: MoE | None = None
        if str(layer) in config["moe_layers_enum"].split(","):
            self.moe = MoE(config, layer)
            self.share_expert = MLP(hidden, config["share_expert_dim"], limit)
        else:
            self.mlp = MLP(hidden, config["intermediate_size"], limit)

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, documents)
        y = self.post_attention_layernorm(x)
        if self.moe is None:
            return x + self.mlp(y)
        return x + (self.share_expert(y) + self.moe(y.flatten(0, 1)).view_as(y))


class TinyStep(nn.Module):
    """The language model; `config` is the checkpoint's config.json."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab, hidden)
        layers = range(config["num_hidden_layers"])
        self.model.layers = nn.ModuleList(Layer(config, i) for i in layers)
        self.model.norm = Norm(hidden, config["rms_norm_eps"])
        self.lm_head = Linear(hidden, vocab)

    def moe_layers(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]

    def set_mode(self, mode: str) -> None:
        """Compute the experts in one of MODES or with one of MISTAKES."""
        for moe in self.moe_layers():
            moe.mode = mode

    def forward(self, ids: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """Next-token logits: three [B, T] integer tensors -> [B, T, vocab].

        Rows may hold several documents; a token attends only to its own document, whose
        positions start at 0.
        """
        x = self.model.embed_tokens(ids).to(torch.bfloat16)
        for layer in self.model.layers:
            x = layer(x, positions, documents)
        return self.lm_head(self.model.norm(x))
