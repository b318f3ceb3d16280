// A reduced grid for compute-sanitizer: every op of the cuda backend once or twice, small, with ragged sizes, plain and
// captured, compared with the CPU backend.
import * as m from '../../dist/lib/index.js';

const cuda = await m.createContext({ backend: 'cuda' });
const cpu = await m.createContext({ backend: 'cpu' });
const values = (length, seed) =>
  Float32Array.from({ length }, (_, i) => (((i * 7919 + seed * 104729) % 2003) - 1001) / 512);
const attempts = [];

const rms = (numbers) =>
  Math.sqrt(numbers.reduce((sum, x) => sum + Number(x) ** 2, 0) / Math.max(numbers.length, 1));

/** Runs `build` on both backends and compares what it returns. */
function compare(name, build, tolerance = 1e-2) {
  attempts.push(async () => {
    const run = async (context, captured) => {
      const work = build(context);
      const step = captured ? context.capture(work) : undefined;
      step?.replay();
      step?.replay();
      const outputs = step?.output ?? work();
      const read = await Promise.all(
        Object.entries(outputs).map(async ([key, tensor]) => [key, await tensor.read()]),
      );
      step?.dispose();
      return read;
    };
    const expected = await run(cpu, false);
    for (const captured of [false, true]) {
      for (const [i, [key, actual]] of (await run(cuda, captured)).entries()) {
        // Of large terms that nearly cancel only the size of the other elements says how exact their sum can be.
        const size = rms(expected[i][1]);
        const wrong = actual.findIndex(
          (x, j) =>
            !(Math.abs(Number(x) - Number(expected[i][1][j])) <= tolerance * (size + Math.abs(Number(x)))),
        );
        if (wrong >= 0)
          throw new Error(`${name}: ${key}[${wrong}] is ${actual[wrong]}, expected ${expected[i][1][wrong]}`);
      }
    }
    console.log(`${name}: ok`);
  });
}

const hidden = 72;
const intermediate = 40;
for (const dtype of ['f32', 'bf16', 'f16']) {
  const floats = (context, shape, seed) =>
    context.tensor(
      dtype,
      shape,
      values(
        shape.reduce((a, b) => a * b),
        seed,
      ),
    );
  const weights = (context, slots, biases = true) =>
    m.packExperts({
      w13: floats(context, [slots, 2 * intermediate, hidden], 1),
      w2: floats(context, [slots, hidden, intermediate], 2),
      ...(biases
        ? { b13: floats(context, [slots, 2 * intermediate], 3), b2: floats(context, [slots, hidden], 4) }
        : {}),
    });
  for (const tokens of [1, 5, 33, 130]) {
    compare(`moe_router ${dtype} ${tokens}`, (c) => {
      const inputs = {
        hidden: floats(c, [tokens, hidden], 5),
        weight: floats(c, [19, hidden], 6),
        bias: c.tensor('f32', [19], values(19, 7)),
      };
      return () => ({ logits: m.moeRouter(inputs) });
    });
  }
  for (const [columns, width] of [
    [9, 72],
    [3, 5],
    [17, 72],
  ]) {
    compare(`moe_combine ${dtype} ${columns} x ${width}`, (c) => {
      const inputs = {
        rows: floats(c, [11 * columns, width], 8),
        inverse: c.tensor(
          'i32',
          [11, columns],
          Int32Array.from(
            { length: 11 * columns },
            (_, i) => ((i * 7) % (11 * columns)) - (i % 5 === 0 ? 1000 : 0),
          ),
        ),
        weights: c.tensor('f32', [11, columns], values(11 * columns, 9)),
      };
      return () => ({ output: m.moeCombine(inputs, { outputScale: 0.5 }) });
    });
  }
  compare(
    `shared_experts ${dtype}`,
    (c) => {
      const x = floats(c, [70, hidden], 10);
      const experts = weights(c, 1);
      const [expertGate, routed] = [floats(c, [hidden], 11), floats(c, [70, hidden], 12)];
      return () => {
        const projected = m.sharedExperts({ hidden: x, experts }, { part: 'gateUp' });
        return {
          whole: m.sharedExperts({ hidden: x, experts, expertGate, routed }),
          down: m.sharedExperts({ hidden: x, experts, expertGate, routed, projected }, { part: 'down' }),
        };
      };
    },
    3e-2,
  );
  const layer = (tokens) => (c) => {
    const x = floats(c, [tokens, hidden], 13);
    const logits = c.tensor('f32', [tokens, 16], values(tokens * 16, 14));
    const bias = c.tensor('f32', [16], values(16, 15));
    const experts = weights(c, 17);
    return () => {
      const options = {
        scoring: 'sigmoid',
        groups: 4,
        topGroups: 2,
        topK: 4,
        sharedExperts: 1,
        renormalize: true,
      };
      const gate = m.moeFusedGate({ logits, bias }, { ...options, routedScalingFactor: 2.5 });
      const sorted = m.moeDispatch({ ids: gate.ids, hidden: x }, { experts: 17, blockSize: 8 });
      const rows = m.moeExperts({
        rows: sorted.rows,
        counts: sorted.counts,
        offsets: sorted.offsets,
        experts,
      });
      const output = m.moeCombine({ rows, inverse: sorted.inverse, weights: gate.weights });
      return { output, fused: m.fusedMoe({ hidden: x, ids: gate.ids, weights: gate.weights, experts }) };
    };
  };
  for (const tokens of [1, 33]) compare(`layer ${dtype} ${tokens}`, layer(tokens), 5e-2);
}

let failed = 0;
for (const attempt of attempts) {
  try {
    await attempt();
  } catch (error) {
    failed++;
    console.log(`failed: ${error.message}`);
  }
}
console.log(failed === 0 ? 'all right' : `${failed} failed`);
await cuda.close();
await cpu.close();
process.exitCode = failed === 0 ? 0 : 1;
