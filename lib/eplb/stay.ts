// The policy that never moves anything: the baseline of every comparison.
import type { Policy } from './policy.js';

export const linear: Policy = {
  name: 'linear',
  summary: 'never moves: the placement in use (at first the linear layout with copies appended) stays',
  keepsBudget: true,
  plan({ current }, layerDone) {
    for (let layer = 0; layer < current.length; layer++) layerDone();
    return { placements: [...current] };
  },
};
