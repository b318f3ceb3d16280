#!/usr/bin/env python3
"""The gate of DeepSeek-V3 (256 experts in 8 groups of which 4 stay, top 8, sigmoid and bias, renormalised, times 2.5) in
PyTorch, eager and compiled, both in CUDA graphs: the live control of bench/device.ts.

    python3 torch_gate.py            times, one JSON object a line
    python3 torch_gate.py --check    compares both with plain Python on the CPU, no GPU needed
"""
import json
import math
import random
import sys

try:
    import torch
except ImportError as error:
    print(json.dumps({"skipped": f"no PyTorch: {error}"}))
    sys.exit(0)

from torch_timing import Timer, about, say

EXPERTS, GROUPS, TOP_GROUPS, TOP_K, SCALE = 256, 8, 4, 8, 2.5
WORK = "gate 256/8/4/8 f32"
# The sweep first: a control that is stopped has then timed what matters most
TOKENS = [40000, 10000, 5000, 15000, 20000, 25000, 30000, 35000, 4096, 512, 64]


def gate(logits, bias):
    scores = torch.sigmoid(logits)
    choices = scores + bias
    grouped = choices.view(-1, GROUPS, EXPERTS // GROUPS)
    kept = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(TOP_GROUPS, dim=-1, sorted=False).indices
    mask = torch.zeros_like(grouped[:, :, 0]).scatter(1, kept, 1.0)
    eligible = grouped.masked_fill((mask == 0).unsqueeze(-1), -math.inf).view(-1, EXPERTS)
    ids = eligible.topk(TOP_K, dim=-1).indices
    weights = scores.gather(1, ids)
    weights = weights * (SCALE / weights.sum(dim=-1, keepdim=True))
    return ids.to(torch.int32), weights


def plain(row, bias):
    """One row, in Python's own arithmetic."""
    scores = [1 / (1 + math.exp(-x)) for x in row]
    choices = [s + b for s, b in zip(scores, bias)]
    size = EXPERTS // GROUPS
    best = [sum(sorted(choices[g * size : (g + 1) * size])[-2:]) for g in range(GROUPS)]
    kept = sorted(range(GROUPS), key=lambda g: -best[g])[:TOP_GROUPS]
    eligible = [e for e in range(EXPERTS) if e // size in kept]
    ids = sorted(eligible, key=lambda e: -choices[e])[:TOP_K]
    total = sum(scores[e] for e in ids)
    return ids, [SCALE * scores[e] / total for e in ids]


def check(compiled, tokens=64):
    generator = random.Random(1)
    logits = [[generator.gauss(0, 1) for _ in range(EXPERTS)] for _ in range(tokens)]
    bias = [0.1 * generator.gauss(0, 1) for _ in range(EXPERTS)]
    for function in (gate, compiled):
        ids, weights = function(torch.tensor(logits), torch.tensor(bias))
        for t in range(tokens):
            expected, expected_weights = plain(logits[t], bias)
            assert ids[t].tolist() == expected, (t, ids[t].tolist(), expected)
            assert all(abs(a - b) < 1e-5 for a, b in zip(weights[t].tolist(), expected_weights)), t
    print("right")


def main():
    compiled = torch.compile(gate, dynamic=True)
    if "--check" in sys.argv:
        return check(compiled)
    if not torch.cuda.is_available():
        return say(skipped="PyTorch sees no CUDA device")
    say(**about())
    timer = Timer()
    torch.manual_seed(1)
    for name, function in (("torch eager", gate), ("torch.compile", compiled)):
        for tokens in TOKENS:
            count = 40 if tokens <= 4096 else 10
            bias = 0.1 * torch.randn(EXPERTS, device="cuda")
            sets = [torch.randn(tokens, EXPERTS, device="cuda") for _ in range(count)]
            try:
                with torch.inference_mode():
                    us = timer.microseconds([lambda logits=logits: function(logits, bias) for logits in sets])
            except Exception as error:  # a compiler that is missing, say
                reason = str(error).strip().split("\n")[0][:200]
                say(skipped=f"{name}: {type(error).__name__}: {reason}")
                break
            say(work=WORK, tokens=tokens, implementation=name, launches=count, microseconds=us)


if __name__ == "__main__":
    main()
