#!/usr/bin/env python3
"""experts_bench and its live controls in one run, merged into one table: its layers, uniform and Zipf, beside
torch._grouped_mm with a permute of its own, and the bf16 8192^3 product before and after each.

    python3 experts_table.py PROGRAM [T|FROM-TO]

PROGRAM is experts_bench (bench/cuda/build.sh). "scaled" is the time at 788 TFLOP/s for what is bound by products: times
this run's matrix ceiling over 788, from 1,024 tokens on.
"""
import re
import subprocess
import sys

import torch
from torch_experts import SHAPES, TOKENS, matmul_flops, times
from torch_timing import Timer, about

LINE = re.compile(
    r"(?P<layer>\S+) +(?P<zipf>zipf)? +(?P<path>\S+) +(?P<tokens>\d+) tokens +hit +(?P<hit>\S+) +(?P<us>\S+) us"
    r" +floor +(?P<floor>\S+) +ratio +\S+ +with rows +(?P<rows>\S+)"
)


def experts_bench(program, layer, tokens):
    """Lines of `experts_bench time`, by (tokens, zipf), and its read ceiling in TB/s."""
    command = [program, "time", "auto", layer, tokens, "zipf"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {(int(m["tokens"]), bool(m["zipf"])): m for m in LINE.finditer(text)}
    return found, float(re.search(r"read ceiling (\S+)", text)[1])


def main():
    program, tokens = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "1-16384"
    least, _, most = tokens.partition("-")
    wanted = [t for t in TOKENS if int(least) <= t <= int(most or least)]
    timer = Timer()
    print("device {device}, torch {torch}, CUDA {cuda}".format(**about()))
    with torch.inference_mode():
        for name in SHAPES:
            ceilings = [matmul_flops(timer)]
            ours, read = experts_bench(program, name, tokens)
            ceilings.append(matmul_flops(timer))
            control = {t: us for t, _, us in times(timer, name, wanted)}
            ceilings.append(matmul_flops(timer))
            torch.cuda.empty_cache()
            scale = min(ceilings[:2]) / 788e12
            print(f"\n{name}: read ceiling {read:.2f} TB/s, matrix ceiling before and after "
                  f"{' / '.join(f'{c * 1e-12:.0f}' for c in ceilings)} TFLOP/s")
            print("tokens   hit path       us   floor ratio | with rows ratio | scaled | Zipf us  ratio  of uniform |"
                  " _grouped_mm us  times")
            for t in wanted:
                line, zipf = ours[t, False], ours[t, True]
                us, floor, rows, skewed = (float(x) for x in (line["us"], line["floor"], line["rows"], zipf["us"]))
                scaled = f"{us * scale:6.0f}" if t >= 1024 else "     -"
                print(f"{t:6} {line['hit']:>5} {line['path']:6} {us:8.1f} {floor:7.1f} {us / floor:5.2f} |"
                      f" {rows:9.1f} {us / rows:5.2f} | {scaled} | {skewed:7.1f} {skewed / float(zipf['floor']):6.2f}"
                      f" {skewed / us:11.2f} | {control[t]:14.1f} {control[t] / us:6.2f}", flush=True)


if __name__ == "__main__":
    main()
