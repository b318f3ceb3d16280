// What every method does in every state, on every backend. The tables are the whole truth: read them beside the
// documentation of Context, Tensor, ExpertWeights and Capture. A cell is one of
//
//   ok     does what it says
//   !CODE  throws MoeError ERR_MOE_CODE at the call
//   ~CODE  gives a promise that rejects with ERR_MOE_CODE
//
// States: `fresh`; `in flight`, with work enqueued that nobody has waited for; `captured`, made by a capture that was
// replayed; `unreplayed`, made by one that was not; `recording`, inside the function that a capture records;
// `disposed`; `closed`, after the close of its context; `lost`, after the device of its context failed.
import { expect, it } from 'vitest';
import { NativeBackend } from '../lib/backend/native.js';
import { OracleBackend } from '../lib/backend/oracle.js';
import { Context } from '../lib/context.js';
import {
  type BackendName,
  type Capture,
  type ExpertWeights,
  fusedMoe,
  MoeError,
  moeRouter,
  packExperts,
  type Tensor,
} from '../lib/index.js';
import { requireBackend } from '../lib/native.js';
import { constructionKey } from '../lib/tensor.js';
import { backends } from './ops/backends.js';

const tables = `
| Context           | fresh | in flight | recording | closed    | lost  |
| tensor            | ok    | ok        | ok        | !DISPOSED | !DEVICE_LOST |
| synchronize       | ok    | ok        | !CAPTURE  | ~DISPOSED | ~DEVICE_LOST |
| synchronizeSync   | ok    | ok        | !CAPTURE  | !DISPOSED | !DEVICE_LOST |
| capture           | ok    | ok        | !CAPTURE  | !DISPOSED | !DEVICE_LOST |
| memory            | ok    | ok        | ok        | !DISPOSED | !DEVICE_LOST |
| describe          | ok    | ok        | ok        | ok        | ok    |
| state             | ok    | ok        | ok        | ok        | ok    |
| toString          | ok    | ok        | ok        | ok        | ok    |
| close             | ok    | ok        | !CAPTURE  | ok        | ok    |
| close with signal | ok    | ok        | !CAPTURE  | ok        | ok    |
| Symbol.dispose    | ok    | ok        | !CAPTURE  | ok        | ok    |

| Tensor            | fresh | in flight | captured | unreplayed | recording | disposed  | closed    | lost  |
| read              | ok    | ok        | ok       | ~CAPTURE   | !CAPTURE  | ~DISPOSED | ~DISPOSED | ~DEVICE_LOST |
| readRaw           | ok    | ok        | ok       | ~CAPTURE   | !CAPTURE  | ~DISPOSED | ~DISPOSED | ~DEVICE_LOST |
| readSync          | ok    | ok        | ok       | !CAPTURE   | !CAPTURE  | !DISPOSED | !DISPOSED | !DEVICE_LOST |
| readRawSync       | ok    | ok        | ok       | !CAPTURE   | !CAPTURE  | !DISPOSED | !DISPOSED | !DEVICE_LOST |
| write             | ok    | ok        | ok       | ok         | ok        | !DISPOSED | !DISPOSED | !DEVICE_LOST |
| to                | ok    | ok        | ok       | ~CAPTURE   | !CAPTURE  | ~DISPOSED | ~DISPOSED | ~DEVICE_LOST |
| input of an op    | ok    | ok        | ok       | -          | ok        | !DISPOSED | !DISPOSED | !DEVICE_LOST |
| toString          | ok    | ok        | ok       | ok         | ok        | ok        | ok        | ok    |
| dispose           | ok    | ok        | ok       | ok         | ok        | ok        | ok        | ok    |

| ExpertWeights     | fresh | in flight | recording | disposed  | closed    | lost  |
| input of an op    | ok    | ok        | ok        | !DISPOSED | !DISPOSED | !DEVICE_LOST |
| packExperts into  | ok    | ok        | ok        | !DISPOSED | !DISPOSED | !DEVICE_LOST |
| bytes             | ok    | ok        | ok        | ok        | ok        | ok    |
| toString          | ok    | ok        | ok        | ok        | ok        | ok    |
| dispose           | ok    | ok        | ok        | ok        | ok        | ok    |

| Capture           | fresh    | in flight | recording | disposed  | closed    | lost  |
| replay            | ok       | ok        | !CAPTURE  | !DISPOSED | !DISPOSED | !DEVICE_LOST |
| output.read       | ~CAPTURE | ok        | !CAPTURE  | ~DISPOSED | ~DISPOSED | ~DEVICE_LOST |
| output            | ok       | ok        | ok        | ok        | ok        | ok    |
| dispose           | ok       | ok        | ok        | ok        | ok        | ok    |
`;

/** A context whose device can be made to fail: from then on the backend says what a broken one says. */
function open(backend: BackendName): { context: Context; fail(): void } {
  let lost = false;
  const check = () => {
    if (lost) throw new MoeError('ERR_MOE_DEVICE_LOST', 'on purpose', { op: 'test' });
  };
  class Fragile extends NativeBackend {
    override synchronizeSync(): void {
      check();
      super.synchronizeSync();
    }
  }
  class FragileOracle extends OracleBackend {
    override synchronizeSync(): void {
      check();
    }
  }
  const made =
    backend === 'oracle'
      ? new FragileOracle()
      : new Fragile(backend, requireBackend(backend), { device: 0, threads: 2 });
  const context = new Context(constructionKey, made, backend, []);
  const fail = () => {
    lost = true;
    expect(() => context.synchronizeSync()).toThrow(/on purpose/);
    expect(context.state).toBe('lost');
  };
  return { context, fail };
}

const [tokens, hidden] = [256, 32];
const ones = new Float32Array(tokens * hidden).fill(1);

/** What the methods of a table are called on, all of one context. */
interface Subject {
  context: Context;
  other: Context;
  tensor: Tensor<'f32'>;
  experts: ExpertWeights;
  capture: Capture<Tensor<'f32'>>;
}
type Method = (subject: Subject) => unknown;

const run = ({ context, experts }: Subject, x?: Tensor<'f32'>) => {
  const input = x ?? context.tensor('f32', [tokens, hidden], ones);
  const ids = context.tensor('i32', [tokens, 1]);
  const weights = context.tensor('f32', [tokens, 1], new Float32Array(tokens).fill(1));
  return fusedMoe({ hidden: input, ids, weights, experts });
};
const isOne = (values: Float32Array) => expect(values).toEqual(ones);

const methods: Record<string, Record<string, Method>> = {
  Context: {
    tensor: ({ context }) => context.tensor('f32', [2], Float32Array.of(1, 2)),
    synchronize: ({ context }) => context.synchronize(),
    synchronizeSync: ({ context }) => context.synchronizeSync(),
    capture: ({ context }) => context.capture(() => 1).dispose(),
    memory: ({ context }) => expect(context.memory().used).toBeGreaterThan(0),
    describe: ({ context }) => expect(context.describe().backend).toBe(context.backend),
    state: ({ context }) => expect(context.state).toMatch(/^(open|closed|lost)$/),
    toString: ({ context }: Subject) => expect(String(context)).toContain(context.backend),
    close: ({ context }) => context.close(),
    'close with signal': ({ context }) => context.close({ signal: new AbortController().signal }),
    'Symbol.dispose': ({ context }) => context[Symbol.dispose](),
  },
  Tensor: {
    read: ({ tensor }) => tensor.read().then(isOne),
    readRaw: ({ tensor }) => tensor.readRaw().then(isOne),
    readSync: ({ tensor }) => isOne(tensor.readSync()),
    readRawSync: ({ tensor }) => isOne(tensor.readRawSync()),
    write: ({ tensor }) => tensor.write(ones),
    to: ({ tensor, other }) => tensor.to(other).then(async (copy) => isOne(await copy.read())),
    'input of an op': ({ tensor }) => moeRouter({ hidden: tensor, weight: tensor }),
    toString: ({ tensor }: Subject) => expect(String(tensor)).toBe(`f32[${tokens}, ${hidden}]`),
    dispose: ({ tensor }) => tensor.dispose(),
  },
  ExpertWeights: {
    'input of an op': (subject) => run(subject),
    'packExperts into': ({ context, experts }) => {
      const w13 = context.tensor('f32', [1, 2, hidden]);
      const w2 = context.tensor('f32', [1, hidden, 1]);
      packExperts({ w13, w2 }, { into: experts, firstSlot: 1 });
    },
    bytes: ({ experts }) => expect(experts.bytes).toBeGreaterThan(0),
    toString: ({ experts }: Subject) => expect(String(experts)).toMatch(/^experts f32/),
    dispose: ({ experts }) => experts.dispose(),
  },
  Capture: {
    replay: ({ capture }) => capture.replay(),
    'output.read': ({ capture }) => capture.output.read().then(isOne),
    output: ({ capture }) => expect(capture.output.shape).toEqual([tokens, hidden]),
    dispose: ({ capture }) => capture.dispose(),
  },
};

/** Brings a subject into a state; what `record` is given runs inside a recording. */
const states: Record<string, (subject: Subject, kind: string, fail: () => void) => void | Promise<void>> = {
  fresh: () => {},
  'in flight': (subject, kind) => {
    if (kind === 'Capture') subject.capture.replay();
    for (let i = 0; i < 4; i++) run(subject, subject.tensor);
    subject.tensor.read().catch(() => {});
  },
  captured: (subject) => {
    subject.capture.replay();
    subject.tensor = subject.capture.output;
  },
  unreplayed: (subject) => {
    subject.tensor = subject.capture.output;
  },
  recording: () => {},
  disposed: ({ tensor, experts, capture }) => {
    for (const each of [tensor, experts, capture]) each.dispose();
  },
  closed: ({ context }) => context.close(),
  lost: (_subject, _kind, fail) => fail(),
};

/** `ok`, `!CODE` or `~CODE`. */
async function outcome(act: () => unknown): Promise<string> {
  const code = (error: unknown) => {
    if (!(error instanceof MoeError)) throw error;
    return error.code.replace('ERR_MOE_', '');
  };
  let result: unknown;
  try {
    result = act();
  } catch (error) {
    return `!${code(error)}`;
  }
  try {
    await result;
  } catch (error) {
    return `~${code(error)}`;
  }
  return 'ok';
}

const cells = tables
  .trim()
  .split('\n\n')
  .flatMap((table) => {
    const rows = table.split('\n').map((line) =>
      line
        .split('|')
        .slice(1, -1)
        .map((cell) => cell.trim()),
    );
    const [[kind, ...columns], ...body] = rows;
    return body.flatMap(([method, ...expected]) =>
      columns.map((state, i) => ({ kind, method, state, expected: expected[i] })),
    );
  })
  .filter(({ expected }) => expected !== '-');

it('every method of the tables is tried, and every one that is tried is in the tables', () => {
  for (const [kind, tried] of Object.entries(methods)) {
    const listed = new Set(cells.filter((cell) => cell.kind === kind).map(({ method }) => method));
    expect([...listed].sort()).toEqual(Object.keys(tried).sort());
  }
});

for (const backend of backends) {
  it.each(cells)(`on ${backend}: $kind.$method, $state: $expected`, async (cell) => {
    const { context, fail } = open(backend);
    await using other = open(backend).context;
    const w13 = context.tensor('f32', [2, 2, hidden]);
    const w2 = context.tensor('f32', [2, hidden, 1]);
    const tensor = context.tensor('f32', [tokens, hidden], ones);
    const experts = packExperts({ w13, w2 });
    const capture = context.capture(() => context.tensor('f32', [tokens, hidden], ones));
    const subject: Subject = { context, other, tensor, experts, capture };
    await states[cell.state](subject, cell.kind, fail);
    const act = () => methods[cell.kind][cell.method](subject);
    if (cell.state !== 'recording') expect(await outcome(act)).toBe(cell.expected);
    else {
      let result: Promise<string> | undefined;
      context
        .capture(() => {
          result = outcome(act);
          return undefined;
        })
        .dispose();
      expect(await result).toBe(cell.expected);
    }
    await context.close();
    expect(await outcome(() => context.close())).toBe('ok');
  });
}
