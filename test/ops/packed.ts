// Expert cases as packed weights of a context.
import { type Context, type ExpertWeights, type PackExpertsOptions, packExperts } from '../../lib/index.js';
import { type ExpertArrays, type ExpertsCase, expertArrays } from '../cases/experts.js';

/** Uploads the arrays of a case and packs them; the uploads are disposed right away. */
export function packCase(
  context: Context,
  given: ExpertsCase,
  arrays: ExpertArrays = expertArrays(given),
  options: PackExpertsOptions = {},
): ExpertWeights {
  const { slots, hidden, intermediate, dtype = 'f32' } = given;
  const shapes = {
    w13: options.transposed ? [slots, hidden, 2 * intermediate] : [slots, 2 * intermediate, hidden],
    w2: options.transposed ? [slots, intermediate, hidden] : [slots, hidden, intermediate],
    b13: [slots, 2 * intermediate],
    b2: [slots, hidden],
  };
  const upload = (name: keyof ExpertArrays) => context.tensor(dtype, shapes[name], arrays[name]);
  const tensors = {
    w13: upload('w13'),
    w2: upload('w2'),
    ...(arrays.b13 === undefined ? {} : { b13: upload('b13') }),
    ...(arrays.b2 === undefined ? {} : { b2: upload('b2') }),
  };
  const swiglu = given.swiglu === undefined ? {} : { swiglu: given.swiglu };
  const experts = packExperts(tensors, { ...(options.into === undefined ? swiglu : {}), ...options });
  for (const tensor of Object.values(tensors)) tensor.dispose();
  return experts;
}
