// Calls of the other ops that are refused, and the packing of weights.
import { describe } from 'vitest';
import {
  allocateExperts,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeRouter,
  packExperts,
  sharedExperts,
} from '../../lib/index.js';
import { backends } from '../ops/backends.js';
import { type Anything, itRefuses, setUp } from './set_up.js';

describe.each(backends)('calls of ops on %s', async (backend) => {
  const { context, f32, i32, experts } = await setUp(backend);

  itRefuses(context, [
    // moe_router
    [
      'hidden mismatch',
      () => moeRouter({ hidden: f32(2, 8), weight: f32(4, 7) }),
      'INVALID_ARG',
      'weight',
      /expected weight: f32\|bf16\|f16\[4, 8\].*hidden = 8 from hidden: f32\[2, 8\].* but received f32\[4, 7\]/,
    ],
    [
      'experts instead of a tensor',
      () => moeRouter({ hidden: f32(2, 8), weight: experts() as Anything }),
      'INVALID_ARG',
      'weight',
      /expected weight: a tensor f32\|bf16\|f16\[experts, hidden\] but received experts f32\[4, 8, 3\]$/,
    ],
    [
      'a tensor instead of experts',
      () =>
        moeExperts({ rows: f32(4, 8), counts: i32(4), offsets: i32(5), experts: f32(4, 6, 8) as Anything }),
      'INVALID_ARG',
      'experts',
      /expected experts: ExpertWeights \(from packExperts\) but received f32\[4, 6, 8\]$/,
    ],
    [
      'a misspelt activation',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3) }, { swiglu: { alfa: 1 } as Anything }),
      'INVALID_ARG',
      'alfa',
      /^\[pack_experts\] unknown option 'alfa'; the options are: alpha, beta, limit/,
    ],
    // moe_dispatch
    [
      'experts missing',
      () => moeDispatch({ ids: i32(2, 2) }, {} as Anything),
      'INVALID_ARG',
      'experts',
      /expected experts: an integer from 1/,
    ],
    [
      'ids as floats',
      () => moeDispatch({ ids: f32(2, 2) as Anything }, { experts: 4 }),
      'INVALID_ARG',
      'ids',
      /expected ids: i32\[tokens, columns\] but received f32\[2, 2\]/,
    ],
    [
      'negative block size',
      () => moeDispatch({ ids: i32(2, 2) }, { experts: 4, blockSize: -1 }),
      'INVALID_ARG',
      'blockSize',
      /received -1/,
    ],
    [
      'tokens mismatch',
      () => moeDispatch({ ids: i32(2, 2), hidden: f32(3, 8) }, { experts: 4 }),
      'INVALID_ARG',
      'hidden',
      /tokens = 2 from ids/,
    ],
    // moe_experts
    [
      'counts of another length',
      () => moeExperts({ rows: f32(4, 8), counts: i32(3), offsets: i32(4), experts: experts() }),
      'INVALID_ARG',
      'experts',
      /slots = 3 from counts: i32\[3\]/,
    ],
    [
      'order without weights',
      () =>
        moeExperts({ rows: f32(4, 8), counts: i32(4), offsets: i32(5), experts: experts(), order: i32(4) }),
      'INVALID_ARG',
      'order',
      /order and weights together/,
    ],
    // moe_combine
    [
      'zero experts without hidden',
      () =>
        moeCombine(
          { rows: f32(4, 8), inverse: i32(2, 2), weights: f32(2, 2) },
          { zeroExperts: 1, firstZeroExpert: 4 },
        ),
      'INVALID_ARG',
      'zeroExperts',
      /ids and hidden/,
    ],
    [
      'weights of another shape',
      () => moeCombine({ rows: f32(4, 8), inverse: i32(2, 2), weights: f32(2, 3) }),
      'INVALID_ARG',
      'weights',
      /columns = 2 from inverse/,
    ],
    [
      'hidden of another dtype',
      () =>
        moeCombine({
          rows: f32(4, 8),
          inverse: i32(2, 2),
          weights: f32(2, 2),
          hidden: context.tensor('bf16', [2, 8]),
        }),
      'INVALID_ARG',
      'hidden',
      /the dtype of rows: f32\[4, 8\]/,
    ],
    // fused_moe and packExperts
    [
      'experts as an object',
      () => fusedMoe({ hidden: f32(2, 8), ids: i32(2, 2), weights: f32(2, 2), experts: {} as Anything }),
      'INVALID_ARG',
      'experts',
      /ExpertWeights \(from packExperts\) but received an object/,
    ],
    [
      'experts of another width',
      () => fusedMoe({ hidden: f32(2, 9), ids: i32(2, 2), weights: f32(2, 2), experts: experts() }),
      'INVALID_ARG',
      'experts',
      /hidden = 9 from hidden: f32\[2, 9\]/,
    ],
    [
      'w13 of another width',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 4) }),
      'INVALID_ARG',
      'w13',
      /expected w13: \[4, 8, 8\] for experts of hidden 8 and intermediate 4 but received \[4, 6, 8\]/,
    ],
    [
      'w13 of rank 2',
      () => packExperts({ w13: f32(6, 8), w2: f32(4, 8, 3) }),
      'INVALID_ARG',
      'w13',
      /\[experts, rows, columns\] but received f32\[6, 8\]/,
    ],
    [
      'w13 of i32',
      () => packExperts({ w13: i32(4, 6, 8) as Anything, w2: f32(4, 8, 3) }),
      'INVALID_ARG',
      'w13',
      /but received i32\[4, 6, 8\]/,
    ],
    [
      'unknown pack option',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3) }, { layout: 1 } as Anything),
      'INVALID_ARG',
      'layout',
      /unknown option 'layout'/,
    ],
    [
      'unknown pack input',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3), w3: f32(1) } as Anything),
      'INVALID_ARG',
      'w3',
      /unknown input 'w3'/,
    ],
    [
      'an unknown activation field',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3) }, { swiglu: { gelu: 1 } as Anything }),
      'INVALID_ARG',
      'gelu',
      /unknown option 'gelu'; the options are: alpha, beta, limit/,
    ],
    [
      'slots beyond the weights',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3) }, { into: experts(), firstSlot: 1 }),
      'INVALID_ARG',
      'firstSlot',
      /slots 1\.\.4 to be among the 4 slots of experts but received firstSlot 1/,
    ],
    [
      'biases where none are held',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3), b2: f32(4, 8) }, { into: experts() }),
      'INVALID_ARG',
      'b13',
      /hold no biases/,
    ],
    [
      'no slots',
      () => allocateExperts(context, { slots: 0, hidden: 8, intermediate: 3, dtype: 'f32' }),
      'INVALID_ARG',
      'slots',
      /from 1/,
    ],
    [
      'pack without inputs',
      () => (packExperts as Anything)(),
      'INVALID_ARG',
      'inputs',
      /expected inputs: an object but received undefined/,
    ],
    [
      'pack with options of 5',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3) }, 5 as Anything),
      'INVALID_ARG',
      'options',
      /received 5/,
    ],
    [
      'pack with a null dtype',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3) }, { dtype: null as Anything }),
      'INVALID_ARG',
      'dtype',
      /'f32', 'bf16', 'f16' but received null/,
    ],
    [
      'an activation that f32 cannot hold',
      () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3) }, { swiglu: { alpha: 1e300 } }),
      'INVALID_ARG',
      'alpha',
      /finite number/,
    ],
    [
      'room in no context',
      () => allocateExperts(undefined as Anything, { slots: 1, hidden: 8, intermediate: 3, dtype: 'f32' }),
      'INVALID_ARG',
      'context',
      /a context from createContext/,
    ],
    [
      'room of no dtype',
      () => allocateExperts(context, { slots: 1, hidden: 8, intermediate: 3 } as Anything),
      'INVALID_ARG',
      'dtype',
      /received undefined/,
    ],
    [
      'zero experts that begin nowhere',
      () =>
        fusedMoe(
          { hidden: f32(2, 8), ids: i32(2, 2), weights: f32(2, 2), experts: experts() },
          { zeroExperts: 2 },
        ),
      'INVALID_ARG',
      'firstZeroExpert',
      /received undefined/,
    ],
    [
      'an output that no memory holds',
      () => moeRouter({ hidden: f32(2 ** 22, 1), weight: f32(2 ** 18, 1) }),
      'OOM',
      'logits',
      /\[moe_router\] out of memory for logits: f32\[4194304, 262144\]: requested 4398046511104 bytes/,
    ],
    // shared_experts
    [
      'several slots',
      () => sharedExperts({ hidden: f32(2, 8), experts: experts() }),
      'INVALID_ARG',
      'experts',
      /1 slot \(one dense MLP\) but received 4/,
    ],
    [
      'down without projection',
      () =>
        sharedExperts(
          { hidden: f32(2, 8), experts: packExperts({ w13: f32(1, 6, 8), w2: f32(1, 8, 3) }) },
          { part: 'down' },
        ),
      'INVALID_ARG',
      'projected',
      /part 'gateUp'/,
    ],
  ]);
});
