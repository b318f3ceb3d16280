import { type CallScope, defineOp } from '../op.js';
import { integer } from '../options.js';
import { moe_dispatch } from '../oracle/moe_dispatch.js';
import type { FloatDType, Tensor } from '../tensor.js';

export interface MoeDispatchInputs {
  /** Expert ids i32 [tokens, columns]; -1 and ids of other ranks are skipped. */
  ids: Tensor<'i32'>;
  /** Hidden states [tokens, hidden]; with them the sorted rows are gathered too. */
  hidden?: Tensor<FloatDType>;
}

export interface MoeDispatchOptions {
  /** Local experts: ids firstExpert .. firstExpert + experts - 1 belong here. */
  experts: number;
  /** Default 0. */
  firstExpert?: number;
  /** Pads every expert's rows to a multiple of this. Default 0: no padding. */
  blockSize?: number;
}

/** `capacity` is tokens * columns without blocks, else the worst case over all routings, a multiple of blockSize. */
export interface MoeDispatchOutputs {
  /** i32 [capacity]: the flat choice (token * columns + column) in each sorted place; tokens * columns where empty. */
  order: Tensor<'i32'>;
  /** i32 [tokens, columns]: the sorted place of each choice, -1 for ids that are not local. */
  inverse: Tensor<'i32'>;
  /** i32 [experts]: rows of each local expert, without padding. */
  counts: Tensor<'i32'>;
  /** i32 [experts + 1]: where each expert's rows begin, padding included; the last entry is the total. */
  offsets: Tensor<'i32'>;
  /** i32 [capacity / blockSize] with blockSize: the local expert of each block, -1 beyond the last used one. */
  blockExperts?: Tensor<'i32'>;
  /** [capacity, hidden] in the dtype of `hidden`, where that is given; empty places are 0. */
  rows?: Tensor<FloatDType>;
}

const choices = ({ dim }: CallScope): number => dim('tokens') * dim('columns');

/** vLLM's worst case: every expert with rows wastes at most blockSize - 1 places. */
function capacity(scope: CallScope): number {
  const rows = choices(scope);
  const block = scope.dim('blockSize');
  if (block === 0) return rows;
  const worst = Math.min(rows + scope.dim('experts') * (block - 1), rows * block);
  return Math.ceil(worst / block) * block;
}

/**
 * Sorts (token, column) choices by expert, stably: one bucket per local expert, choices ascending inside it. With
 * `blockSize` the layout is that of vLLM's moe_align_block_size.
 * @throws MoeError ERR_MOE_INVALID_ARG for 2^31 rows and more; and what every `Op` throws.
 */
export const moeDispatch = defineOp<MoeDispatchInputs, MoeDispatchOptions, MoeDispatchOutputs>({
  name: 'moe_dispatch',
  inputs: { ids: 'i32[tokens, columns]', hidden: 'f32|bf16|f16[tokens, hidden]?' },
  options: {
    experts: integer({ min: 1, max: 65536 }),
    firstExpert: integer({ min: 0, max: 0x7fffffff, default: 0 }),
    blockSize: integer({ min: 0, max: 65536, default: 0 }),
  },
  computed: {
    capacity,
    blocks: (scope) => (scope.dim('blockSize') === 0 ? 0 : capacity(scope) / scope.dim('blockSize')),
  },
  outputs: {
    order: 'i32[capacity]',
    inverse: 'i32[tokens, columns]',
    counts: 'i32[experts]',
    offsets: 'i32[experts + 1]',
    blockExperts: { type: 'i32[blocks]', when: ({ dim }) => dim('blockSize') > 0 },
    rows: { type: '=hidden[capacity, hidden]', when: ({ given }) => given.has('hidden') },
  },
  returns: 'record',
  rules: [
    [
      'ids',
      (scope) =>
        capacity(scope) <= 0x7fffffff ||
        `expected at most 2147483647 dispatched rows but ids: i32[${scope.dim('tokens')}, ${scope.dim('columns')}] ` +
          `need ${capacity(scope)}`,
    ],
  ],
  oracle: moe_dispatch,
});
