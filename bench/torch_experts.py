#!/usr/bin/env python3
"""A layer of routed experts in PyTorch: torch._grouped_mm between a permute and an unpermute of plain PyTorch, bf16, in
CUDA graphs: the live control of bench/device.ts. The first line has the bf16 8192^3 product of the same run, the ceiling
of matrix products.

    python3 torch_experts.py            times, one JSON object a line
    python3 torch_experts.py --check    compares with dense products in f32 on the CPU, no GPU needed
"""
import json
import sys

try:
    import torch
except ImportError as error:
    print(json.dumps({"skipped": f"no PyTorch: {error}"}))
    sys.exit(0)

from torch_timing import Timer, about, say

# name: hidden, intermediate, routed experts, shared experts (always chosen), choices among the routed ones
SHAPES = {
    "V3-TP8": (7168, 256, 256, 1, 8),
    "V3-EP": (7168, 2048, 9, 0, 2),
    "Qwen3": (2048, 768, 128, 0, 8),
}
TOKENS = [1, 16, 64, 256, 1024, 4096, 16384]


def route(tokens, experts, shared, top_k, device):
    """ids [tokens, top_k + shared], distinct in a row, the shared experts last; weights of the same shape."""
    ids = torch.rand(tokens, experts, device=device).topk(top_k, dim=-1).indices
    last = torch.arange(experts, experts + shared, device=device).expand(tokens, shared)
    ids = torch.cat([ids, last], dim=1)
    return ids, torch.rand(ids.shape, device=device)


def layer(x, ids, weights, w13, w2):
    """x [T, H]; w13 [E, 2I, H], gate half first; w2 [E, H, I]."""
    tokens, columns = ids.shape
    experts, intermediate = w2.shape[0], w2.shape[2]
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = x.index_select(0, order // columns)
    both = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends)
    active = torch.nn.functional.silu(both[:, :intermediate]) * both[:, intermediate:]
    down = torch._grouped_mm(active, w2.transpose(1, 2), offs=ends)
    choices = torch.empty_like(down).index_copy_(0, order, down).view(tokens, columns, -1)
    return (choices * weights.unsqueeze(-1).to(x.dtype)).sum(dim=1)


def dense(x, ids, weights, w13, w2):
    """The same one token at a time, in f32."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    intermediate = w2.shape[2]
    for t in range(x.shape[0]):
        for c in range(ids.shape[1]):
            e = int(ids[t, c])
            both = w13[e].float() @ x[t].float()
            active = torch.nn.functional.silu(both[:intermediate]) * both[intermediate:]
            out[t] += weights[t, c] * (w2[e].float() @ active)
    return out


def relative_error(tokens, hidden, intermediate, experts, shared, top_k, device):
    weights13, weights2 = packed(hidden, intermediate, experts + shared, device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    ids, weights = route(tokens, experts, shared, top_k, device)
    actual = layer(x, ids, weights, weights13, weights2).float()
    expected = dense(x, ids, weights, weights13, weights2)
    return float((actual - expected).norm() / expected.norm())


def packed(hidden, intermediate, slots, device):
    w13 = torch.empty(slots, 2 * intermediate, hidden, dtype=torch.bfloat16, device=device)
    w2 = torch.empty(slots, hidden, intermediate, dtype=torch.bfloat16, device=device)
    w13.normal_(0, hidden**-0.5)
    w2.normal_(0, intermediate**-0.5)
    return w13, w2


def check():
    torch.manual_seed(1)
    for tokens in (1, 5, 33):
        for experts, shared, top_k in ((4, 1, 2), (9, 0, 2), (16, 0, 8)):
            error = relative_error(tokens, 64, 32, experts, shared, top_k, "cpu")
            assert error < 1e-2, (tokens, experts, error)
    print("right")


def matmul_flops(timer, size=8192):
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    return 2 * size**3 / (1e-6 * timer.microseconds([lambda: a @ b] * 4))


def times(timer, name, tokens_of=TOKENS):
    """(tokens, launches, us) of a layer of SHAPES; raises where torch._grouped_mm is missing or wrong."""
    hidden, intermediate, experts, shared, top_k = SHAPES[name]
    error = relative_error(16, hidden, intermediate, experts, shared, top_k, "cuda")
    if not error < 1e-2:
        raise ValueError(f"torch._grouped_mm is off by {error:.2g}")
    w13, w2 = packed(hidden, intermediate, experts + shared, "cuda")
    for tokens in tokens_of:
        count = 8 if tokens <= 256 else 4
        sets = []
        for _ in range(count):
            x = torch.randn(tokens, hidden, device="cuda").bfloat16()
            sets.append((x, *route(tokens, experts, shared, top_k, "cuda")))
        yield tokens, count, timer.microseconds([lambda given=given: layer(*given, w13, w2) for given in sets])


def main():
    if "--check" in sys.argv:
        return check()
    if not torch.cuda.is_available():
        return say(skipped="PyTorch sees no CUDA device")
    timer = Timer()
    torch.manual_seed(1)
    with torch.inference_mode():
        say(**about(), matmulFlopsPerSecond=matmul_flops(timer))
        if not hasattr(torch, "_grouped_mm"):
            return say(skipped="this PyTorch has no torch._grouped_mm")
        for name in SHAPES:
            try:
                for tokens, count, us in times(timer, name):
                    say(work=f"experts {name}", tokens=tokens, implementation="torch._grouped_mm", launches=count,
                        microseconds=us)
            except Exception as error:
                reason = str(error).strip().split("\n")[0][:200]
                say(skipped=f"{name}: {type(error).__name__}: {reason}")


if __name__ == "__main__":
    main()
