// What public kernels took on one NVIDIA H200: figures recorded once, for a reader to set beside a run's own. They are
// of another day and machine state than the run, so compare ratios to the floor; the live controls are bench/torch_*.py.
//
// Recorded 2026-11-22 on one H200: driver 580.159, CUDA 13.0, PyTorch 2.11, Triton 3.6. sglang (sgl: its kernel
// package's gates and align, Triton experts), vLLM (grouped_topk, top-k softmax and sigmoid, align, permute), FlashInfer
// (fi: noAuxTc; fi_pdl: with programmatic dependent launch; cake: its routing kernel), DeepGEMM (SM90 grouped GEMMs),
// torch._grouped_mm, PyTorch eager and torch.compile(dynamic), each as of mid-2026 and built from source.
//
// Method: device time of a CUDA graph of R launches on R sets of buffers (gates 40; experts 8 up to 256 tokens, then 4),
// a 512 MiB read before every replay, median of 11 replays over R. Random normal logits, bias 0.1 x normal, uniform
// routing. Spread between repeats: 2.6% for gates, 1.3% (median) to 10% (worst) for experts. Ceilings of that run: a copy
// kernel 4.27 TB/s, a read kernel 4.3 TB/s, an empty graph node 1.0 us, bf16 products of 8192^3 788 TFLOP/s.

/** Microseconds per launch: `rows[tokens]` holds a figure for every column, null where none was taken. */
export interface PeerTable {
  readonly columns: readonly string[];
  readonly rows: Readonly<Record<number, readonly (number | null)[]>>;
}

/** One line about where the figures come from, for reports. */
export const recordedOn =
  '2026-11-22, one NVIDIA H200, driver 580.159, CUDA 13.0, PyTorch 2.11, Triton 3.6, peers as of mid-2026';

/** 256 experts in 8 groups of which 4 stay, top 8, sigmoid and bias, renormalised, times 2.5. */
export const gate256: PeerTable = {
  columns: [
    'sgl f32',
    'sgl f32 +1shared',
    'sgl bf16',
    'vllm f32',
    'vllm bf16',
    'fi f32',
    'fi bf16',
    'fi_pdl f32',
    'cake f32',
    'cake bf16',
    'torch eager f32',
    'torch.compile f32',
  ],
  rows: {
    1: [11.4, 11.53, 9.81, 3.64, 3.69, 3.62, 3.57, 2.96, 2.76, 2.72, 43.6, 28.3],
    8: [12.94, 13.45, 10.09, 3.88, 3.87, 3.8, 3.76, 3.07, 2.91, 2.9, null, null],
    64: [16.9, 17.94, 11.85, 3.86, 3.91, 3.87, 3.86, 3.18, 2.98, 2.96, 53.8, 34.4],
    512: [17.14, 18.24, 11.97, 4.35, 4.33, 4.26, 4.23, 3.6, 3.34, 3.31, 68.4, 45],
    4096: [24.02, 25.18, 15.3, 13.67, 13.8, 13.13, 13.13, 12.59, 8.36, 8.36, 183.3, 160.3],
    5000: [24, 25.34, 15.43, 16.06, 16.09, 15.33, 15.38, 14.77, 9.65, 9.63, null, null],
    10000: [36.62, 38.05, 25.66, 28.46, 28.42, 27.22, 27.04, 26.53, 16.48, 16.47, 406.8, 376.7],
    15000: [48.34, 50.58, 30.78, 41.05, 40.81, 38.84, 38.86, 38.37, 23.37, 23.33, null, null],
    20000: [62.46, 66.02, 38.71, 53.46, 53.3, 50.81, 50.78, 50.02, 30.29, 30.2, null, null],
    25000: [70.18, 74.25, 43.89, 66.04, 65.89, 62.58, 62.63, 61.82, 37.14, 37.03, null, null],
    30000: [85.22, 90.83, 51.99, 78.44, 78.56, 74.42, 74.63, 73.46, 44.17, 43.89, null, null],
    35000: [100.26, 106.26, 59.63, 90.95, 90.9, 85.86, 86.2, 85.25, 51, 50.78, null, null],
    40000: [109.88, 116.63, 64.67, 103.23, 103.17, 97.72, 97.95, 97.41, 57.77, 57.62, 1379, 1321],
    131072: [335.03, 353.66, 187.06, 331.03, 330.63, 313.47, 313.59, 312.88, 183.15, 182.73, 4543, 4398],
  },
};

/** 384 experts in one group, top 8, sigmoid and bias, renormalised, scaled (the last column: not scaled). */
export const gate384: PeerTable = {
  columns: ['sgl_kimi f32', 'vllm f32', 'vllm bf16', 'fi f32', 'fi bf16', 'vllm topk_sigmoid f32'],
  rows: {
    1: [5.09, 4.01, 3.99, 3.95, 3.92, 5.44],
    8: [5.23, 4.16, 4.12, 4.11, 4.07, 5.63],
    64: [5.35, 4.22, 4.24, 4.23, 4.21, 6.6],
    512: [7.18, 5.02, 5.06, 4.89, 4.84, 7.17],
    4096: [16.59, 20.43, 20.38, 19.79, 19.58, 17.24],
    5000: [18.83, 24.12, 23.9, 23.17, 23.16, 19.09],
    10000: [31.93, 44.35, 44.12, 42.81, 42.91, 40.02],
    20000: [60.98, 85.03, 84.67, 82.08, 82.07, 77.98],
    40000: [113.29, 166.19, 166.05, 160.76, 160.2, 154.5],
    131072: [350.49, 537.32, 537, 518.19, 517.16, 499.87],
  },
};

/** Softmax over 128 experts, top 8, renormalised. */
export const softmax128: PeerTable = {
  columns: ['sgl f32', 'sgl bf16', 'vllm f32', 'vllm bf16', 'torch eager f32'],
  rows: {
    1: [3.85, 3.83, 4.36, 4.35, 15.55],
    8: [4.05, 3.92, 4.94, 4.72, null],
    64: [4.39, 4.18, 5.63, 5.52, null],
    512: [4.82, 4.37, 6.39, 5.76, 21.42],
    4096: [8.9, 6.18, 14.92, 7.98, null],
    5000: [10.07, 7.07, 15.89, 8.67, null],
    10000: [16.66, 11.14, 25.05, 13.13, 81.32],
    20000: [29.56, 18.8, 50.87, 22.91, null],
    40000: [55.3, 34.34, 102.66, 44.24, 272.19],
    131072: [172.68, 105.89, 339.37, 147.43, 887.49],
  },
};

/** Softmax over 64 experts, top 6, renormalised. */
export const softmax64: PeerTable = {
  columns: ['sgl f32', 'sgl bf16', 'vllm f32', 'vllm bf16', 'torch eager f32'],
  rows: {
    1: [3.14, 3.11, 3.61, 3.48, 15.22],
    8: [3.36, 3.23, 3.91, 3.73, null],
    64: [3.7, 3.6, 4.47, 4.4, null],
    512: [3.92, 3.78, 4.75, 4.65, 20.34],
    4096: [4.97, 4.26, 6.37, 5.06, null],
    5000: [5.4, 4.56, 6.86, 5.4, null],
    10000: [7.96, 5.86, 9.57, 6.79, 52.77],
    20000: [12.88, 8.98, 15.64, 10.12, null],
    40000: [22.56, 14.78, 32.85, 17.62, 158.3],
    131072: [65.71, 41.14, 115.96, 59.57, 512.74],
  },
};

/** 257 experts, 9 columns: block-aligned order (block 128); permute and unpermute move rows of 7168 bf16. */
export const align257: PeerTable = {
  columns: ['sglang align', 'vLLM align', 'vLLM moe_permute', 'vLLM moe_unpermute'],
  rows: {
    1: [4.68, 4.96, null, null],
    8: [4.61, 5.12, null, null],
    64: [5.26, 5.42, 13.7, 12.9],
    512: [7.27, 7.98, null, null],
    1024: [10.19, 10.31, 91, 40.1],
    4096: [25.64, 28.23, 268.9, 146.6],
    5000: [31.59, 31.99, null, null],
    10000: [55.5, 59.3, 634.7, 348.7],
    20000: [112.85, 113.21, null, null],
    40000: [208.2, 233.84, null, null],
  },
};

const expertColumns = [
  'Triton look-up',
  'Triton best',
  'DeepGEMM',
  '_grouped_mm, vLLM permute',
  '_grouped_mm, torch permute',
  'Triton best, fp8',
  'DeepGEMM, fp8',
];

/** DeepSeek-V3 as one of 8 tensor-parallel ranks: hidden 7168, intermediate 256, 257 experts, 9 columns, the last one shared; bf16. */
export const expertsV3TP8: PeerTable = {
  columns: expertColumns,
  rows: {
    1: [47.6, 47.6, 76.4, 91.4, 98.3, 44.4, 61.3],
    16: [315.1, 291.9, 568.4, 489.6, 514.9, 174.4, 368.7],
    64: [652.3, 610.6, 998.8, 974, 1018, 346.6, 676.1],
    256: [736.1, 736.1, 1158, 1097, 1237, 450.8, 756.2],
    1024: [923.4, 853.4, 1286, 1206, 1697, 604.2, 873.3],
    4096: [1563, 1563, 2044, 1816, 3664, 1325, 1374],
    16384: [5213, 4854, 5024, 5181, 12470, 4375, 3467],
  },
};

/** DeepSeek-V3 as an expert-parallel rank: hidden 7168, intermediate 2048, 9 experts, 2 columns; bf16. */
export const expertsV3EP: PeerTable = {
  columns: expertColumns,
  rows: {
    1: [67.4, 60.3, 68, 106.3, 120.3, 51.3, 51.4],
    16: [206.2, 200.9, 260.1, 311.6, 329.6, 117.4, 158.7],
    64: [249.8, 216.7, 268.4, 321.6, 342.5, 130.7, 162.9],
    256: [238.8, 238.8, 300.4, 306.6, 373.8, 165.5, 193.9],
    1024: [434.4, 434.4, 472.4, 406, 567.6, 318.2, 284.2],
    4096: [1433, 1433, 1349, 1296, 1948, 1045, 788.6],
    16384: [6352, 5415, 5111, 5115, 6619, 4224, 2909],
  },
};

/** Qwen3-30B-A3B: hidden 2048, intermediate 768, 128 experts, 8 columns; bf16. */
export const expertsQwen3: PeerTable = {
  columns: expertColumns,
  rows: {
    1: [33.2, 33.2, 51, 65, 84.1, 30, 46.8],
    16: [197.7, 196.1, 369.4, 310.4, 333.6, 118.3, 237.1],
    64: [297.3, 296.5, 435.8, 438.6, 480.8, 170.8, 279.6],
    256: [324.8, 318.7, 472, 442.8, 501, 196.1, 293.6],
    1024: [387.9, 387.3, 558.1, 477.1, 636.5, 262.9, 348.1],
    4096: [797.3, 797.3, 932.7, 859.6, 1410, 689.2, 618.7],
    16384: [2824, 2824, 2781, 2700, 4552, 2454, 1854],
  },
};
