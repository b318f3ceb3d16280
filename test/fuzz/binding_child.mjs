// Throws random values at everything that an addon exports, in a process of its own:
//
//   node binding_child.mjs BACKEND SEED CALLS [MILLISECONDS]
//
// The binding trusts nobody: whatever it is given it refuses, or it works on memory that is there. Legal records are
// those that ops make; they are mutated and sent again. Prints `alive` and what was taken, at the end.
import { createRequire } from 'node:module';
import * as m from 'moe-kernels';

const [, , backend, seedText, callsText, millisecondsText = '1e9'] = process.argv;
const require = createRequire(import.meta.url);
const addon = require(m.backendStatuses().find((status) => status.backend === backend).loadedFrom);

let state = Number(seedText) >>> 0;
const next = () => {
  state = (state + 0x6d2b79f5) >>> 0;
  let h = Math.imul(state ^ (state >>> 15), state | 1);
  h ^= h + Math.imul(h ^ (h >>> 7), h | 61);
  return ((h ^ (h >>> 14)) >>> 0) / 2 ** 32;
};
const random = (below) => Math.floor(next() * below);
const pick = (list) => list[random(list.length)];
const chance = (probability) => next() < probability;
class Thrown extends Error {}

// Legal records, with the context whose handles they hold
const records = [];
const Native = addon.Context;
addon.Context = class extends Native {
  enqueue(record, length) {
    if (addon.Context !== Native) records.push({ context: this, record: record.slice(0, length) });
    return super.enqueue(record, length);
  }
};
const ctx = await m.createContext({ backend, threads: 2 });
const kept = legalWork(ctx);
addon.Context = Native;

function legalWork(ctx) {
  const f32 = (...shape) =>
    ctx.tensor('f32', shape, new Float32Array(shape.reduce((a, b) => a * b)).fill(0.5));
  const i32 = (shape, ...values) => ctx.tensor('i32', shape, Int32Array.from(values));
  const experts = m.packExperts({ w13: f32(2, 6, 4), w2: f32(2, 4, 3), b13: f32(2, 6), b2: f32(2, 4) });
  const dense = m.packExperts({ w13: f32(1, 6, 4), w2: f32(1, 4, 3) });
  const hidden = f32(3, 4);
  const logits = m.moeRouter({ hidden, weight: f32(2, 4), bias: f32(2) });
  const load = ctx.tensor('i64', [4]);
  const idMap = i32([1, 3], 0, 1, 2);
  const gate = m.moeFusedGate(
    { logits, bias: f32(2), validTokens: i32([1], 2), idMap, load },
    { topK: 1, sharedExperts: 1, captureLogicalIds: true },
  );
  const plain = m.moeDispatch({ ids: gate.ids, hidden }, { experts: 2 });
  const blocks = m.moeDispatch({ ids: gate.ids, hidden }, { experts: 2, blockSize: 4 });
  const { rows, counts, offsets, inverse, order } = plain;
  const outputs = m.moeExperts({ rows, counts, offsets, experts });
  const onInput = m.moeExperts({
    rows: f32(2, 4),
    counts: i32([2], 1, 1),
    offsets: i32([3], 0, 1, 2),
    experts,
    order: i32([2], 0, 1),
    weights: f32(1, 2),
  });
  const combined = m.moeCombine(
    { rows: outputs, inverse, weights: gate.weights, ids: gate.ids, hidden },
    { zeroExperts: 1, firstZeroExpert: 2 },
  );
  const fused = m.fusedMoe({ hidden, ids: gate.ids, weights: gate.weights, experts });
  const projected = m.sharedExperts({ hidden, experts: dense }, { part: 'gateUp' });
  const down = m.sharedExperts(
    { hidden, experts: dense, projected, expertGate: f32(4), routed: fused },
    { part: 'down' },
  );
  // Held, or the collector would end their handles
  return [
    experts,
    dense,
    hidden,
    logits,
    load,
    idMap,
    gate,
    plain,
    blocks,
    outputs,
    onInput,
    combined,
    projected,
    down,
    order,
  ];
}

/** Sizes that are refused or tiny: nothing between a few bytes and more than any machine has. */
const numbers = [
  -1,
  -0,
  0,
  1,
  2,
  3,
  4,
  7,
  8,
  0.5,
  1.5,
  NaN,
  Infinity,
  -Infinity,
  5e-324,
  1e300,
  2 ** 45,
  2 ** 53,
  2 ** 53 + 2,
  2 ** 62,
  2 ** 64,
  -(2 ** 31),
  -(2 ** 63),
];
const odd = [...numbers, 2 ** 31 - 1, 2 ** 31, 2 ** 32, 2 ** 24 + 1];
const arrays = [
  Float32Array,
  Float64Array,
  Uint16Array,
  Int32Array,
  BigInt64Array,
  Uint8Array,
  Int8Array,
  Uint8ClampedArray,
  BigUint64Array,
];

function array() {
  const Type = pick(arrays);
  const bytes = 8 * random(9);
  const make = pick([
    () => new Type(random(9)),
    () => new Type(new SharedArrayBuffer(bytes)),
    () => new Type(new SharedArrayBuffer(bytes, { maxByteLength: 128 })),
    () => {
      const view = new Type(new ArrayBuffer(bytes, { maxByteLength: 128 }));
      view.buffer.resize(pick([0, 8, 128]));
      return view;
    },
    () => {
      const view = new Type(random(9));
      structuredClone(view.buffer, { transfer: [view.buffer] });
      return view;
    },
    () => new Type(new ArrayBuffer(128), Type.BYTES_PER_ELEMENT * random(4), random(8)),
    () => Object.defineProperty(new Type(4), 'length', { value: 1e9 }),
    () => new DataView(new ArrayBuffer(8)),
    () => new ArrayBuffer(bytes),
  ]);
  const made = make();
  if (Type === Float64Array && made instanceof Float64Array)
    for (let i = 0; i < 16; i++) made[i] = pick(numbers);
  return made;
}

const raise = () => {
  throw new Thrown('on purpose');
};

function anything() {
  return pick([
    () => pick(numbers),
    () => pick(numbers),
    () => pick(handles),
    array,
    array,
    () => pick([undefined, null, true, false, '', 'x', '1', 10n, -1n, Symbol.iterator]),
    () =>
      pick([raise, () => {}, class {}, class extends Error {}, async () => {}, Math.max, Promise.resolve(1)]),
    () =>
      pick([{}, [], [1, 2], new Map(), new Date(0), /x/, new Error('x'), Object.create(null), globalThis]),
    () => ({ device: pick(odd), threads: pick([1, 2, -1, 0.5, NaN, 'x', null]) }),
    () =>
      Object.defineProperty({ threads: 1 }, pick(['device', 'threads', 'length', 'then']), { get: raise }),
    () => new Proxy({}, { get: raise, has: raise, getPrototypeOf: raise }),
    () => new Proxy(new Float64Array(4), {}),
    () => {
      const { proxy, revoke } = Proxy.revocable({}, {});
      revoke();
      return proxy;
    },
    () => ({ valueOf: raise, toString: raise, [Symbol.toPrimitive]: raise }),
    () => pick(contexts),
    () => addon,
    () => records[random(records.length)].record,
  ])();
}

const contexts = [];
const handles = [0];
const captures = [0];
const methods = Object.getOwnPropertyNames(addon.Context.prototype).filter((name) => name !== 'constructor');
const tally = { taken: 0, refused: 0, settled: 0, rejected: 0 };

function open(options = { device: 0, threads: 1 + random(3) }) {
  const made = new addon.Context(options);
  if (contexts.length < 6) contexts.push(made);
  else {
    const at = random(contexts.length);
    attempt(() => contexts[at].abandon());
    contexts[at] = made;
  }
  return made;
}

const perhaps = (legal) => (chance(0.8) ? legal() : anything());
/** Arguments that a method might take. */
const shaped = {
  allocate: () => [perhaps(() => random(9)), perhaps(() => random(20))],
  allocateExperts: () => [
    perhaps(() =>
      Float64Array.of(random(3), random(5), random(5), random(4), random(2), 1, 0, pick([0, 1, NaN])),
    ),
  ],
  bytes: () => [pick(handles)],
  release: () => [pick(handles)],
  write: () => [pick(handles), chance(0.3) ? undefined : anything()],
  read: () => [pick(handles), anything()],
  readSync: () => [pick(handles), anything()],
  enqueue: () => mutated(),
  replay: () => [pick(captures)],
  releaseCapture: () => [pick(captures)],
};

/** A legal record with a few of its numbers changed. */
function mutated() {
  let record = [...pick(records).record];
  for (let changes = random(4); changes > 0; changes--) {
    const at = random(record.length);
    const change = random(7);
    if (change === 0) record[at] = pick(odd);
    else if (change === 1) record[at] += pick([-1, 1, 0.5, 2 ** 24]);
    else if (change === 2) record[at] = record[random(record.length)];
    else if (change === 3) record = record.slice(0, 1 + random(record.length));
    else if (change === 4) record.push(pick(odd));
    else if (change === 5) record[0] = random(9);
    else record[at] = pick(handles);
  }
  const array = Float64Array.from(record);
  return [array, chance(0.9) ? array.length : anything()];
}

function watch(result) {
  if (!(result instanceof Promise)) return;
  result.then(
    () => tally.settled++,
    () => tally.rejected++,
  );
}

function attempt(call) {
  try {
    const result = call();
    tally.taken++;
    return result;
  } catch {
    tally.refused++;
    return undefined;
  }
}

const errorClasses = [
  m.MoeError,
  m.MoeError,
  m.MoeError,
  class {},
  Error,
  raise,
  () => 1,
  class {
    constructor() {
      raise();
    }
  },
];

const begun = performance.now();
const limit = Number(millisecondsText);
open();
let calls = 0;
while (calls < Number(callsText) && performance.now() - begun < limit) {
  calls++;
  const kind = next();
  // Half of the records go to the context whose handles they hold
  const context = chance(0.5) ? records[0].context : pick(contexts);
  if (kind < 0.02) attempt(() => pick([addon.describe, addon.probe, addon.externalMemory])(anything()));
  else if (kind < 0.03) attempt(() => addon.setErrorClass(chance(0.7) ? pick(errorClasses) : anything()));
  else if (kind < 0.04) attempt(() => open(chance(0.5) ? undefined : anything()));
  else if (kind < 0.05)
    attempt(() =>
      pick([
        () => addon.Context(anything()),
        () => Reflect.construct(addon.Context, [{ threads: 1 }], Map),
      ])(),
    );
  else if (kind < 0.08)
    watch(attempt(() => addon.Context.prototype[pick(methods)].call(anything(), anything(), anything())));
  else {
    const name = pick(methods);
    // The context of the legal records stays open, in one lane: the others come and go
    if (context === records[0].context && /close|abandon|release|Capture|Lane/.test(name)) continue;
    const given =
      name in shaped && chance(0.85) ? shaped[name]() : Array.from({ length: random(4) }, anything);
    const result = attempt(() => context[name](...given));
    watch(result);
    if (name === 'allocate' || name === 'allocateExperts')
      if (result !== undefined && handles.length < 400) handles.push(result);
    if (name === 'endCapture' && result !== undefined) captures.push(result);
  }
  if (calls % 64 === 0) await new Promise((turn) => setImmediate(turn));
}

// After all that, answers are still right
addon.setErrorClass(m.MoeError);
// A close may have been refused, and waits that nobody asks about would keep the process
for (const context of contexts) attempt(() => context.abandon());
try {
  await ctx.synchronize();
} catch {
  // One of the records was legal and its data was not
}
const x = ctx.tensor('f32', [1, 3], Float32Array.of(1, 2, 3));
const answer = await m.moeRouter({ hidden: x, weight: x }).read();
if (answer[0] !== 14) throw new Error(`expected 14 but received ${answer}`);
await ctx.close();
if (kept.length === 0 || tally.taken < calls / 20 || tally.refused < calls / 20)
  throw new Error(`one-sided: ${JSON.stringify(tally)}`);
console.log('alive', calls, JSON.stringify(tally));
