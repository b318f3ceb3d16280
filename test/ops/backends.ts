// Which backends the op tests run on. The oracle and the CPU always; CUDA and Ascend where a context opens.
// MOE_KERNELS_TEST_BACKENDS (comma-separated) names them instead. A backend that is named or always on and cannot be
// opened fails the suite: a test that silently skips the kernels proves nothing.
import { type BackendName, type Context, createContext } from '../../lib/index.js';

const required: readonly BackendName[] = ['oracle', 'cpu'];
const optional: readonly BackendName[] = ['cuda', 'ascend'];

async function available(): Promise<BackendName[]> {
  const named = process.env.MOE_KERNELS_TEST_BACKENDS;
  if (named) return named.split(',') as BackendName[];
  const backends = [...required];
  for (const backend of optional) {
    try {
      await (await createContext({ backend })).close();
      backends.push(backend);
    } catch {
      // Not on this machine
    }
  }
  return backends;
}

export const backends = await available();

const contexts = new Map<BackendName, Promise<Context>>();

/** The context that the tests of a file share; lives as long as its process. */
export function contextOf(backend: BackendName): Promise<Context> {
  let context = contexts.get(backend);
  if (context === undefined) {
    context = createContext({ backend });
    contexts.set(backend, context);
  }
  return context;
}
