// Runs gate cases through a context and through the oracle, and checks a result against everything known about it.
import { expect } from 'vitest';
import { type Context, moeFusedGate, type Tensor } from '../../lib/index.js';
import { moe_fused_gate } from '../../lib/oracle/moe_fused_gate.js';
import { type GateCase, gateInputs, resolveGateOptions } from '../cases/gate.js';
import { clearness, gap, judgedRow, judgeRow } from '../cases/gate_judge.js';

export interface GateResult {
  readonly ids: Int32Array;
  readonly weights: Float32Array;
  readonly logicalIds?: Int32Array;
  readonly load?: BigInt64Array;
}

/** The tensors of a case; `validTokens` as a number or as a tensor. */
export function gateTensors(context: Context, given: GateCase, valid: 'number' | 'tensor' = 'number') {
  const { tokens, experts, dtype, logits, bias, validTokens, rounds, idMap, load } = gateInputs(given);
  const count =
    validTokens === undefined ? undefined : context.tensor('i32', [1], Int32Array.of(validTokens));
  return {
    logits: context.tensor(dtype, [tokens, experts], logits),
    ...(bias === undefined ? {} : { bias: context.tensor('f32', [experts], bias) }),
    ...(validTokens === undefined ? {} : { validTokens: valid === 'number' ? validTokens : count! }),
    ...(idMap === undefined ? {} : { idMap: context.tensor('i32', [rounds, idMap.length / rounds], idMap) }),
    ...(load === undefined ? {} : { load: context.tensor('i64', [load.length], load) }),
  };
}

export async function runGate(
  context: Context,
  given: GateCase,
  valid?: 'number' | 'tensor',
): Promise<GateResult> {
  const inputs = gateTensors(context, given, valid);
  const outputs = moeFusedGate(inputs, given.options);
  const { ids, weights, logicalIds } = outputs;
  const result = {
    ids: await ids.read(),
    weights: await weights.read(),
    ...(logicalIds === undefined ? {} : { logicalIds: await logicalIds.read() }),
    ...(inputs.load === undefined ? {} : { load: await inputs.load.read() }),
  };
  for (const tensor of [...Object.values(inputs), ...Object.values(outputs)]) (tensor as Tensor).dispose?.();
  return result;
}

export function oracleGate(given: GateCase): GateResult {
  const { tokens, experts, logits, bias, validTokens, rounds, idMap, load } = gateInputs(given);
  const options = resolveGateOptions(given);
  const { topK, sharedExperts } = options;
  const columns = topK + sharedExperts;
  const outputs = {
    ids: { shape: [tokens, columns], data: new Int32Array(tokens * columns) },
    weights: { shape: [tokens, columns], data: new Float32Array(tokens * columns) },
    logicalIds: { shape: [tokens, topK], data: new Int32Array(tokens * topK) },
  };
  moe_fused_gate(
    {
      logits: { shape: [tokens, experts], data: logits },
      ...(bias === undefined ? {} : { bias: { shape: [experts], data: bias } }),
      ...(validTokens === undefined ? {} : { validTokens }),
      ...(idMap === undefined ? {} : { idMap: { shape: [rounds, idMap.length / rounds], data: idMap } }),
      ...(load === undefined ? {} : { load: { shape: [load.length], data: load } }),
    },
    options,
    outputs,
  );
  return {
    ids: outputs.ids.data,
    weights: outputs.weights.data,
    logicalIds: outputs.logicalIds.data,
    ...(load === undefined ? {} : { load }),
  };
}

/**
 * Checks a result: every row is legal in the f64 reading and equals the oracle's where that is unambiguous; padding,
 * map and load follow from the logical ids. Gives how many rows were compared with the oracle's.
 */
export function checkGate(given: GateCase, result: GateResult): { valid: number; compared: number } {
  const inputs = gateInputs(given);
  const options = resolveGateOptions(given);
  const { topK, sharedExperts } = options;
  const columns = topK + sharedExperts;
  const { tokens, experts, idMap, rounds, load } = inputs;
  const valid = inputs.validTokens ?? tokens;
  const oracle = oracleGate(given);
  expect(result.ids.length).toBe(tokens * columns);
  expect(result.weights.length).toBe(tokens * columns);
  expect(result.ids.subarray(valid * columns).every((id) => id === -1)).toBe(true);
  expect(result.weights.subarray(valid * columns).every((weight) => weight === 0)).toBe(true);
  expect(result.logicalIds?.subarray(valid * topK).every((id) => id === -1) ?? true).toBe(true);

  let compared = 0;
  for (let t = 0; t < valid; t++) {
    const ids = result.ids.subarray(t * columns, (t + 1) * columns);
    const weights = result.weights.subarray(t * columns, (t + 1) * columns);
    const logical = logicalRow(given, result, t);
    if (logical === undefined) throw new Error('a case with an id map needs captureLogicalIds');
    if (idMap !== undefined) {
      const row = (t % rounds) * (experts + sharedExperts);
      expect([...ids], `mapped ids of row ${t}`).toEqual(logical.map((id) => idMap[row + id]));
    }
    const judged = judgedRow(inputs, options, t);
    const complaint = judgeRow(judged, options, logical, weights);
    expect(complaint, `row ${t}: ids ${logical}, weights ${weights}`).toBeUndefined();

    const expected = logicalRow(given, oracle, t)!;
    const clear = clearness(judged, options, expected);
    if (clear === undefined) continue;
    compared++;
    if (clear === 'order') expect(logical, `ids of row ${t}`).toEqual(expected);
    else expect(logical.toSorted(), `id set of row ${t}`).toEqual(expected.toSorted());
    logical.forEach((id, c) => {
      const weight = oracle.weights[t * columns + expected.indexOf(id)];
      const close = Math.abs(weights[c] - weight) <= gap * Math.max(1, weight);
      if (close || weights[c] === weight || options.renormalize) return; // the judge knows better about tiny sums
      expect.fail(`row ${t}: weight of expert ${id} is ${weights[c]} instead of ${weight}`);
    });
  }
  if (load !== undefined && result.load !== undefined) {
    const counted = load.slice();
    for (const id of result.ids.subarray(0, valid * columns))
      if (id >= 0 && id < counted.length) counted[id] += 1n;
    expect(result.load).toEqual(counted);
  }
  return { valid, compared };
}

/** A row's ids before the map, or undefined where the result does not have them. */
function logicalRow(given: GateCase, { ids, logicalIds }: GateResult, token: number): number[] | undefined {
  const { topK, sharedExperts, zeroExperts } = resolveGateOptions(given);
  const columns = topK + sharedExperts;
  if (!given.rounds) return [...ids.subarray(token * columns, (token + 1) * columns)];
  if (logicalIds === undefined) return undefined;
  const shared = Array.from({ length: sharedExperts }, (_, j) => given.experts - zeroExperts + j);
  return [...logicalIds.subarray(token * topK, (token + 1) * topK), ...shared];
}

/**
 * Checks a large result whose rows repeat (`period`): the first of them as `checkGate` does, the others by being equal to
 * those, then padding, map and load.
 */
export function checkManyRows(given: GateCase & { readonly period: number }, result: GateResult): void {
  const { tokens, experts, idMap, rounds, load, validTokens: valid = tokens } = gateInputs(given);
  const { topK, sharedExperts } = resolveGateOptions(given);
  const columns = topK + sharedExperts;
  const { validTokens: _, rounds: __, slots: ___, ...plain } = given;
  const first = Math.min(given.period, valid);
  const logical = new Int32Array(valid * columns);
  for (let t = 0; t < valid; t++) logical.set(logicalRow(given, result, t)!, t * columns);
  checkGate(
    { ...plain, tokens: first },
    { ids: logical.slice(0, first * columns), weights: result.weights.slice(0, first * columns) },
  );
  const counted = load?.slice();
  for (let i = 0; i < valid * columns; i++) {
    const t = Math.floor(i / columns);
    const same = (t % given.period) * columns + (i % columns);
    const ids = (t % rounds) * (experts + sharedExperts);
    const id = idMap === undefined ? logical[i] : idMap[ids + logical[i]];
    const right =
      logical[i] === logical[same] &&
      result.ids[i] === id &&
      Math.abs(result.weights[i] - result.weights[same]) <= gap * Math.max(1, result.weights[same]);
    if (!right) {
      expect.fail(
        `row ${t}, column ${i % columns}: id ${logical[i]}, mapped ${result.ids[i]}, weight ${result.weights[i]}; ` +
          `row ${t % given.period}: id ${logical[same]}, weight ${result.weights[same]}; the map has ${id}`,
      );
    }
    if (counted !== undefined && id >= 0 && id < counted.length) counted[id] += 1n;
  }
  expect(result.ids.length).toBe(tokens * columns);
  expect(result.ids.subarray(valid * columns).every((id) => id === -1)).toBe(true);
  expect(result.weights.subarray(valid * columns).every((weight) => weight === 0)).toBe(true);
  expect(result.load).toEqual(counted);
}
