// Bad input gets an error that names op, argument, expected and received, and leaves everything as it was.
import vm from 'node:vm';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  allocateExperts,
  type Context,
  createContext,
  type DType,
  dtypes,
  fusedMoe,
  moeCombine,
  moeDispatch,
  moeExperts,
  moeFusedGate,
  moeRouter,
  packExperts,
  sharedExperts,
} from '../lib/index.js';
import { decode, encode } from '../lib/tensor.js';
import { failure, rejection } from './failures.js';
import { backends } from './ops/backends.js';

// biome-ignore lint/suspicious/noExplicitAny: the point is to pass what the types forbid
type Anything = any;

describe.each(backends)('on %s', (backend) => {
  let context: Context;
  beforeAll(async () => {
    context = await createContext({ backend });
  });
  afterAll(() => context.close());

  const f32 = (...shape: number[]) => context.tensor('f32', shape);
  const i32 = (...shape: number[]) => context.tensor('i32', shape);
  const experts = () => packExperts({ w13: f32(4, 6, 8), w2: f32(4, 8, 3) });

  /** [what is wrong, the call, code, argument, message] */
  const calls: [string, () => unknown, string, string | undefined, RegExp][] = [
    // moe_fused_gate
    [
      'no inputs',
      () => (moeFusedGate as Anything)(),
      'INVALID_ARG',
      'inputs',
      /expected inputs: an object but received undefined/,
    ],
    [
      'null inputs',
      () => (moeFusedGate as Anything)(null, { topK: 1 }),
      'INVALID_ARG',
      'inputs',
      /received null/,
    ],
    [
      'missing logits',
      () => moeFusedGate({} as Anything, { topK: 1 }),
      'INVALID_ARG',
      'logits',
      /expected logits: a tensor f32\|bf16\|f16\[tokens, experts\] but received undefined/,
    ],
    [
      'array for a tensor',
      () => moeFusedGate({ logits: [1, 2] as Anything }, { topK: 1 }),
      'INVALID_ARG',
      'logits',
      /received an array of 2/,
    ],
    [
      'typed array for a tensor',
      () => moeFusedGate({ logits: new Float32Array(4) as Anything }, { topK: 1 }),
      'INVALID_ARG',
      'logits',
      /received Float32Array\(16 bytes\)/,
    ],
    [
      'number for a tensor',
      () => moeFusedGate({ logits: 7 as Anything }, { topK: 1 }),
      'INVALID_ARG',
      'logits',
      /received 7/,
    ],
    [
      'unknown input',
      () => moeFusedGate({ logits: f32(2, 8), biases: f32(8) } as Anything, { topK: 1 }),
      'INVALID_ARG',
      'biases',
      /unknown input 'biases'; the inputs are: logits, bias, validTokens, idMap, load/,
    ],
    [
      'wrong dtype',
      () => moeFusedGate({ logits: i32(2, 8) as Anything }, { topK: 1 }),
      'INVALID_ARG',
      'logits',
      /expected logits: f32\|bf16\|f16\[tokens, experts\] but received i32\[2, 8\]/,
    ],
    [
      'wrong rank',
      () => moeFusedGate({ logits: f32(8) }, { topK: 1 }),
      'INVALID_ARG',
      'logits',
      /expected logits: .*\[tokens, experts\] but received f32\[8\]/,
    ],
    [
      'bias too short',
      () => moeFusedGate({ logits: f32(2, 8), bias: f32(7) }, { topK: 1 }),
      'INVALID_ARG',
      'bias',
      /expected bias: f32\[8\] \(experts = 8 from logits: f32\[2, 8\]\) but received f32\[7\]/,
    ],
    [
      'bias of another dtype',
      () => moeFusedGate({ logits: f32(2, 8), bias: context.tensor('bf16', [8]) as Anything }, { topK: 1 }),
      'INVALID_ARG',
      'bias',
      /expected bias: f32\[experts\] but received bf16\[8\]/,
    ],
    [
      'idMap without shared columns',
      () => moeFusedGate({ logits: f32(2, 8), idMap: i32(1, 8) }, { topK: 1, sharedExperts: 1 }),
      'INVALID_ARG',
      'idMap',
      /expected idMap: i32\[1, 9\].*sharedExperts = 1 from options/,
    ],
    [
      'idMap without rounds',
      () => moeFusedGate({ logits: f32(2, 8), idMap: i32(0, 8) }, { topK: 1 }),
      'INVALID_ARG',
      'idMap',
      /at least 1 round/,
    ],
    [
      'validTokens too large',
      () => moeFusedGate({ logits: f32(2, 8), validTokens: 3 }, { topK: 1 }),
      'INVALID_ARG',
      'validTokens',
      /an integer from 0 to 2 \(tokens\) but received 3/,
    ],
    [
      'validTokens negative',
      () => moeFusedGate({ logits: f32(2, 8), validTokens: -1 }, { topK: 1 }),
      'INVALID_ARG',
      'validTokens',
      /received -1/,
    ],
    [
      'validTokens fractional',
      () => moeFusedGate({ logits: f32(2, 8), validTokens: 0.5 }, { topK: 1 }),
      'INVALID_ARG',
      'validTokens',
      /received 0\.5/,
    ],
    [
      'validTokens BigInt',
      () => moeFusedGate({ logits: f32(2, 8), validTokens: 1n as Anything }, { topK: 1 }),
      'INVALID_ARG',
      'validTokens',
      /received 1n/,
    ],
    [
      'no topK',
      () => moeFusedGate({ logits: f32(2, 8) }, {} as Anything),
      'INVALID_ARG',
      'topK',
      /expected topK: an integer from 1 to 32 but received undefined/,
    ],
    [
      'topK of 0',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 0 }),
      'INVALID_ARG',
      'topK',
      /received 0/,
    ],
    [
      'topK over 32',
      () => moeFusedGate({ logits: f32(2, 64) }, { topK: 33 }),
      'INVALID_ARG',
      'topK',
      /received 33/,
    ],
    [
      'topK over experts',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 9 }),
      'INVALID_ARG',
      'topK',
      /expected topK <= 8 \(experts\) but received 9/,
    ],
    [
      'topK over chosen groups',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 5, groups: 4, topGroups: 2 }),
      'INVALID_ARG',
      'topK',
      /expected topK <= 4 \(experts in the chosen groups\) but received 5/,
    ],
    [
      'topK as a string',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: '2' as Anything }),
      'INVALID_ARG',
      'topK',
      /received '2'/,
    ],
    [
      'topK as BigInt',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 2n as Anything }),
      'INVALID_ARG',
      'topK',
      /received 2n/,
    ],
    [
      'topK NaN',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: Number.NaN }),
      'INVALID_ARG',
      'topK',
      /received NaN/,
    ],
    [
      'groups that do not divide',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, groups: 3 }),
      'INVALID_ARG',
      'groups',
      /expected groups to divide experts = 8 but received 3/,
    ],
    [
      'more topGroups than groups',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, groups: 2, topGroups: 4 }),
      'INVALID_ARG',
      'topGroups',
      /expected topGroups <= groups = 2 but received 4/,
    ],
    [
      'unknown option',
      () => moeFusedGate({ logits: f32(2, 8) }, { topk: 1 } as Anything),
      'INVALID_ARG',
      'topk',
      /unknown option 'topk'; the options are: topK, scoring/,
    ],
    [
      'options as an array',
      () => moeFusedGate({ logits: f32(2, 8) }, [] as Anything),
      'INVALID_ARG',
      'options',
      /expected options: an object but received an array of 0/,
    ],
    [
      'unknown scoring',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, scoring: 'relu' as Anything }),
      'INVALID_ARG',
      'scoring',
      /one of 'softmax', 'sigmoid', 'sqrtSoftplus' but received 'relu'/,
    ],
    [
      'scaling factor 0',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, routedScalingFactor: 0 }),
      'INVALID_ARG',
      'routedScalingFactor',
      /a finite number above 0 \(in f32, and so its reciprocal\) but received 0/,
    ],
    [
      'scaling factor infinite',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, routedScalingFactor: Infinity }),
      'INVALID_ARG',
      'routedScalingFactor',
      /received Infinity/,
    ],
    [
      'scaling factor that f32 cannot divide by',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, routedScalingFactor: 1e-40 }),
      'INVALID_ARG',
      'routedScalingFactor',
      /reciprocal\) but received 1e-40/,
    ],
    [
      'zero experts among the local ones',
      () =>
        fusedMoe(
          { hidden: f32(2, 8), ids: i32(2, 2), weights: f32(2, 2), experts: experts() },
          { zeroExperts: 2, firstZeroExpert: 3 },
        ),
      'INVALID_ARG',
      'firstZeroExpert',
      /outside the local ids 0\.\.3 but received 3\.\.4/,
    ],
    [
      'nine shared experts',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, sharedExperts: 9 }),
      'INVALID_ARG',
      'sharedExperts',
      /from 0 to 8/,
    ],
    [
      'only zero experts',
      () => moeFusedGate({ logits: f32(2, 8) }, { topK: 1, zeroExperts: 8 }),
      'INVALID_ARG',
      'zeroExperts',
      /expected zeroExperts < experts = 8/,
    ],
    [
      'too many experts',
      () => moeFusedGate({ logits: f32(1, 1025) }, { topK: 1 }),
      'INVALID_ARG',
      'logits',
      /1 to 1024 experts but received 1025/,
    ],
    [
      'no experts',
      () => moeFusedGate({ logits: f32(1, 0) }, { topK: 1 }),
      'INVALID_ARG',
      'logits',
      /received 0/,
    ],
    [
      'bias with selection by logits',
      () => moeFusedGate({ logits: f32(2, 8), bias: f32(8) }, { topK: 1, selection: 'logits' }),
      'INVALID_ARG',
      'bias',
      /expected no bias with selection 'logits'/,
    ],
    [
      'load of i32',
      () => moeFusedGate({ logits: f32(2, 8), load: i32(8) as Anything }, { topK: 1 }),
      'INVALID_ARG',
      'load',
      /i64/,
    ],
    // moe_router
    [
      'hidden mismatch',
      () => moeRouter({ hidden: f32(2, 8), weight: f32(4, 7) }),
      'INVALID_ARG',
      'weight',
      /expected weight: f32\|bf16\|f16\[4, 8\].*hidden = 8 from hidden: f32\[2, 8\].* but received f32\[4, 7\]/,
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
      /slots 1\.\.4 to be among the 4/,
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
  ];

  it.each(calls)('%s', (_, act, code, arg, message) => {
    const error = failure(act);
    expect({ code: error.code, arg: error.arg }).toEqual({ code: `ERR_MOE_${code}`, arg });
    expect(error.message).toMatch(message);
    expect(error.message).toMatch(/^\[\w+\] /);
  });

  it('goes on working after every one of them', async () => {
    const { ids } = moeFusedGate(
      { logits: context.tensor('f32', [1, 3], Float32Array.of(1, 3, 2)) },
      { topK: 2 },
    );
    expect([...(await ids.read())]).toEqual([1, 2]);
  });

  it('refuses disposed tensors, weights and captures', async () => {
    const logits = f32(2, 8);
    logits.dispose();
    logits.dispose();
    expect(failure(() => moeFusedGate({ logits }, { topK: 1 }))).toMatchObject({
      code: 'ERR_MOE_DISPOSED',
      op: 'moe_fused_gate',
      arg: 'logits',
    });
    expect(await rejection(() => logits.read())).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
    expect(failure(() => logits.write(new Float32Array(16)))).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
    const packed = experts();
    packed.dispose();
    const call = () => fusedMoe({ hidden: f32(2, 8), ids: i32(2, 2), weights: f32(2, 2), experts: packed });
    expect(failure(call)).toMatchObject({ code: 'ERR_MOE_DISPOSED', arg: 'experts' });
    const capture = context.capture(() => moeRouter({ hidden: f32(2, 8), weight: f32(4, 8) }));
    capture.dispose();
    expect(failure(() => capture.replay())).toMatchObject({ code: 'ERR_MOE_DISPOSED', op: 'replay' });
    expect(await rejection(() => capture.output.read())).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
  });

  it('refuses tensors of another context and names both', async () => {
    const other = await createContext({ backend });
    const error = failure(() => moeRouter({ hidden: f32(2, 8), weight: other.tensor('f32', [4, 8]) }));
    expect(error).toMatchObject({ code: 'ERR_MOE_WRONG_CONTEXT', op: 'moe_router', arg: 'weight' });
    expect(error.message).toMatch(/copy it with tensor\.to\(context\)/);
    await other.close();
    expect(failure(() => other.tensor('f32', [1]))).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
    expect(await rejection(() => other.synchronize())).toMatchObject({ code: 'ERR_MOE_DISPOSED' });
  });

  it('refuses reads, waits, captures and promises while a capture is recorded, and recovers', async () => {
    const tensor = f32(2);
    for (const record of [
      () => tensor.readSync(),
      () => tensor.read(),
      () => tensor.readRaw(),
      () => context.synchronize(),
      // biome-ignore lint/suspicious/noThenProperty: the point is to return one
      () => ({ then: () => {} }),
      () => context.synchronizeSync(),
      () => context.capture(() => 1),
      () => context.close(),
      async () => tensor,
    ]) {
      expect(failure(() => context.capture(record))).toMatchObject({ code: 'ERR_MOE_CAPTURE' });
    }
    const thrown = failure(() => context.capture(() => moeRouter({ hidden: tensor, weight: tensor })));
    expect(thrown).toMatchObject({ code: 'ERR_MOE_INVALID_ARG', op: 'moe_router' });
    expect([...(await tensor.read())]).toEqual([0, 0]);
  });

  it('refuses to read what a capture made before the first replay', async () => {
    using capture = context.capture(() => context.tensor('f32', [2], Float32Array.of(1, 2)));
    expect(await rejection(() => capture.output.read())).toMatchObject({ code: 'ERR_MOE_CAPTURE' });
    capture.replay();
    expect([...(await capture.output.read())]).toEqual([1, 2]);
  });

  it('keeps failures apart: what failed stays failed, also in replays, and every failure is told', async () => {
    const rows = f32(2, 4);
    const weights = f32(2, 1);
    const inverse = (value: number) => context.tensor('i32', [2, 1], Int32Array.of(value, 0));
    if (backend !== 'oracle') {
      const first = moeCombine({ rows, inverse: inverse(7), weights });
      const second = moeCombine({ rows, inverse: inverse(7), weights });
      expect(await rejection(() => first.read())).toMatchObject({ op: 'moe_combine' });
      // A device keeps one note of an argument until a wait tells it: there the first wait has told of both.
      if (backend === 'cpu') {
        expect(await rejection(() => context.synchronize())).toMatchObject({ op: 'moe_combine' });
        expect(await rejection(() => second.read())).toMatchObject({ op: 'moe_combine' });
      }
      await context.synchronize();
    }
    const input = inverse(7);
    using capture = context.capture(() => ({
      bad: moeCombine({ rows, inverse: input, weights }),
      good: moeRouter({ hidden: rows, weight: rows }),
    }));
    if (backend === 'oracle') expect(failure(() => capture.replay())).toMatchObject({ op: 'moe_combine' });
    else capture.replay();
    if (backend !== 'cuda')
      expect(await rejection(() => capture.output.bad.read())).toMatchObject({ op: 'moe_combine' });
    else expect(await rejection(() => context.synchronize())).toMatchObject({ op: 'moe_combine' });
    expect([...(await capture.output.good.read())]).toEqual([0, 0, 0, 0]);
    input.write(Int32Array.of(1, 0));
    capture.replay();
    expect([...(await capture.output.bad.read())]).toEqual(new Array(8).fill(0));
  });

  it.each(Object.keys(dtypes) as DType[])('moves %s both ways, as bits and as values', async (dtype) => {
    const { raw, values } = dtypes[dtype];
    const numbers =
      dtype === 'i64' ? BigInt64Array.of(0n, 1n, 2n) : new (values as typeof Uint8Array)([0, 1, 2]);
    const tensor = context.tensor(dtype, [3], numbers as never);
    expect(await tensor.read()).toEqual(numbers);
    expect(tensor.readSync()).toEqual(numbers);
    const bits = await tensor.readRaw();
    expect(bits).toBeInstanceOf(raw);
    expect(tensor.readRawSync()).toEqual(bits);
    const again = context.tensor(dtype, [3], bits as never);
    expect(await again.read()).toEqual(numbers);
    expect(await again.write(numbers as never).readRaw()).toEqual(bits);
  });

  it('takes typed arrays of another realm', async () => {
    const foreign = vm.runInNewContext('Float32Array.of(1, 2)');
    expect(foreign).not.toBeInstanceOf(Float32Array);
    expect([...(await context.tensor('f32', [2], foreign).read())]).toEqual([1, 2]);
    expect([...(await context.tensor('bf16', [2], foreign).read())]).toEqual([1, 2]);
  });

  it('rounds e4m3 alike on every backend', async () => {
    const values = Float32Array.from({ length: 4096 }, (_, i) => (i - 2048) / 4.3);
    values.set([NaN, Infinity, -Infinity, 448, 464, 2 ** -9, 2 ** -10, 3 * 2 ** -11, -0, 2 ** -6]);
    const bits = await context.tensor('f8_e4m3', [4096], values).readRaw();
    expect(bits).toEqual(encode('f8_e4m3', values));
    const all = Uint8Array.from({ length: 256 }, (_, i) => i);
    expect(await context.tensor('f8_e4m3', [256], all).read()).toEqual(decode('f8_e4m3', all));
  });

  it('reports device data that leaves its bounds at the wait, naming the op', async () => {
    const call = () => {
      const rows = f32(4, 8);
      const counts = context.tensor('i32', [4], Int32Array.of(1, 1, 99, 1));
      const offsets = context.tensor('i32', [5], Int32Array.of(0, 1, 2, 3, 4));
      return moeExperts({ rows, counts, offsets, experts: experts() });
    };
    // The oracle computes at the call, so it throws there.
    const error = backend === 'oracle' ? failure(call) : await rejection(() => call().read());
    expect(error).toMatchObject({ op: 'moe_experts' });
    expect(error.message).toMatch(/rows of expert 2 among 0\.\.3 but received 2\.\.100/);
    if (backend !== 'oracle') await context.synchronize(); // told once
  });
});

it('refuses unknown backends, devices and options of contexts', async () => {
  expect(await rejection(() => createContext({ backend: 'tpu' as Anything }))).toMatchObject({
    code: 'ERR_MOE_INVALID_ARG',
    arg: 'backend',
    message: expect.stringMatching(/one of 'auto', 'cuda', 'ascend', 'cpu', 'oracle' but received 'tpu'/),
  });
  expect(await rejection(() => createContext({ threads: 0 }))).toMatchObject({ arg: 'threads' });
  expect(await rejection(() => createContext({ gpu: 1 } as Anything))).toMatchObject({ arg: 'gpu' });
});
