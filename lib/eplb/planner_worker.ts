// The thread of a Planner: takes a request, answers with progress and then always with a plan or an error, so that
// whoever waits is never left waiting. Before the first request it plans a small made-up load, so that the first real
// plan is not the one that pays for compilation.
import { parentPort } from 'node:worker_threads';
import { MoeError } from '../errors.js';
import { Loads } from './loads.js';
import { type Plan, planSync } from './plan.js';
import { packPlacement, type ReplyMessage, type RequestMessage, unpackPlacement } from './planner.js';
import { generateTrace } from './trace.js';

const port = parentPort;
if (port === null)
  throw new MoeError('ERR_MOE_INTERNAL', 'expected to run as a worker thread', { op: 'plan' });

const progressEvery = 8;

function warmUp(): void {
  const steps = 16;
  const plans = 4;
  const loads = generateTrace({
    kind: 'drifting',
    steps: steps * plans,
    layers: 12,
    experts: 256,
    seed: 1,
    tokens: 512,
  });
  let last: Plan | undefined;
  for (const [index, window] of loads.windows(steps).entries())
    last = planSync({
      loads: window,
      devices: 32,
      slots: 9,
      ...(last === undefined ? {} : { current: last.placements, memory: last.memory }),
      ...(index + 1 < plans ? {} : { maxMoves: 600 }),
    });
  // Phases of prefill and decode, whose steps are scenarios of their own
  const phases = generateTrace({ kind: 'mixed', steps: 32, layers: 12, experts: 256, seed: 1, skew: 1 });
  planSync({ loads: phases, devices: 32, slots: 9 });
}

const reply = (message: ReplyMessage): void => port.postMessage(message);

port.on('message', ({ loads, current, ...rest }: RequestMessage) => {
  try {
    let done = 0;
    const plan = planSync(
      {
        ...rest,
        loads: new Loads(loads, loads.counts),
        ...(current === undefined ? {} : { current: current.map(unpackPlacement) }),
      },
      () => {
        done++;
        if (done % progressEvery === 0 || done === loads.layers)
          reply({ kind: 'progress', done, layers: loads.layers });
      },
    );
    const { from: _, ...made } = plan; // the planner has it
    reply({ kind: 'plan', plan: { ...made, placements: plan.placements.map(packPlacement) } });
  } catch (error) {
    if (error instanceof MoeError)
      reply({
        kind: 'error',
        code: error.code,
        message: error.message,
        ...(error.op === undefined ? {} : { op: error.op }),
        ...(error.arg === undefined ? {} : { arg: error.arg }),
      });
    else
      reply({
        kind: 'error',
        code: 'ERR_MOE_INTERNAL',
        message: error instanceof Error ? (error.stack ?? error.message) : String(error),
        op: 'plan',
      });
  }
});

warmUp();
