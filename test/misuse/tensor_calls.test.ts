// Tensors that cannot be made, written or moved.
import { describe } from 'vitest';
import { backends } from '../ops/backends.js';
import { type Anything, itRefuses, setUp } from './set_up.js';

describe.each(backends)('calls of tensors on %s', async (backend) => {
  const { context, f32 } = await setUp(backend);

  itRefuses(context, [
    // tensors
    [
      'unknown dtype',
      () => context.tensor('f64' as Anything, [2]),
      'INVALID_ARG',
      'dtype',
      /expected dtype: one of f32, bf16.* but received 'f64'/,
    ],
    [
      'dtype from the prototype',
      () => context.tensor('toString' as Anything, [2]),
      'INVALID_ARG',
      'dtype',
      /received 'toString'/,
    ],
    [
      'no shape',
      () => context.tensor('f32', undefined as Anything),
      'INVALID_ARG',
      'shape',
      /1 to 8 integers >= 0 but received undefined/,
    ],
    ['negative dimension', () => context.tensor('f32', [-1]), 'INVALID_ARG', 'shape', /received \[-1\]/],
    ['fractional dimension', () => context.tensor('f32', [1.5]), 'INVALID_ARG', 'shape', /received \[1\.5\]/],
    [
      'BigInt dimension',
      () => context.tensor('f32', [2n as Anything]),
      'INVALID_ARG',
      'shape',
      /received \[2n\]/,
    ],
    ['rank 0', () => context.tensor('f32', []), 'INVALID_ARG', 'shape', /received \[\]/],
    [
      'data too short',
      () => context.tensor('f32', [3], new Float32Array(2)),
      'INVALID_ARG',
      'data',
      /Float32Array\(3\) for f32 but received Float32Array\(2\)/,
    ],
    [
      'data of another type',
      () => context.tensor('f32', [2], new Float64Array(2) as Anything),
      'INVALID_ARG',
      'data',
      /received Float64Array\(2\)/,
    ],
    [
      'a plain array as data',
      () => context.tensor('f32', [2], [1, 2] as Anything),
      'INVALID_ARG',
      'data',
      /received an array of 2/,
    ],
    [
      'write of another length',
      () => f32(2).write(new Float32Array(3)),
      'INVALID_ARG',
      'data',
      /Float32Array\(2\)/,
    ],
    [
      'a product beyond 2^53',
      () => context.tensor('f32', [2 ** 40, 2 ** 40]),
      'OOM',
      'tensor',
      /too many elements/,
    ],
    [
      'capture of no function',
      () => context.capture(3 as Anything),
      'INVALID_ARG',
      'record',
      /expected record: a function but received 3/,
    ],
  ]);
});
