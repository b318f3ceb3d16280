// The only reader of process.env: every variable the package looks at, in one table.

interface Variable<T> {
  readonly name: string;
  readonly help: string;
  readonly read: () => T;
}

const raw = (name: string): string | undefined => {
  const value = process.env[name];
  return value === undefined || value === '' ? undefined : value;
};

/** What can be set from outside. Options given in code win over these. */
export const env = {
  backend: {
    name: 'MOE_KERNELS_BACKEND',
    help: "backend that 'auto' stands for (cuda, ascend, cpu or oracle)",
    read: () => raw('MOE_KERNELS_BACKEND'),
  },
  threads: {
    name: 'MOE_KERNELS_THREADS',
    help: 'threads of a CPU context (default: the parallelism available to the process)',
    read: () => raw('MOE_KERNELS_THREADS'),
  },
  cudaExperts: {
    name: 'MOE_KERNELS_CUDA_EXPERTS',
    help: 'how CUDA computes experts wherever it can (plain, mma, wgmma or stream); read by the CUDA addon',
    read: () => raw('MOE_KERNELS_CUDA_EXPERTS'),
  },
  isa: {
    name: 'MOE_KERNELS_ISA',
    help: 'instruction set of a CPU context (avx512, avx2, neon or scalar; default: the best that runs here)',
    read: () => raw('MOE_KERNELS_ISA'),
  },
} as const satisfies Record<string, Variable<string | undefined>>;
