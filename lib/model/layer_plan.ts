// One MoE layer of a checkpoint, decided from names, shapes and configuration before a byte of its weights is read;
// lib/model/layer.ts then only moves bytes. Every tensor of a block must be accounted for, so that nothing it holds is
// silently left out.
import { join } from 'node:path';
import { MoeError } from '../errors.js';
import type { SwiGLU } from '../experts.js';
import { MAX_EXPERTS, MAX_TOP_K } from '../ops/moe_fused_gate.js';
import type { FloatDType } from '../tensor.js';
import type { Architecture, GateRules, ListedExperts, StackedExperts } from './architectures.js';
import { checkpointError } from './checkpoint_error.js';
import { keys, ModelConfig } from './config.js';
import type { SafetensorsReader, TensorInfo } from './safetensors.js';

/** A row-major matrix inside a tensor: `rows` rows of `columns`, from row `firstRow` of its memory on. */
export interface Matrix {
  readonly info: TensorInfo;
  readonly firstRow: number;
  readonly rows: number;
  readonly columns: number;
}

/** Where the weights of one MLP lie. The parts of `w13` follow each other in the order gate, up. */
export interface MlpSource {
  readonly w13: readonly Matrix[];
  readonly w2: Matrix;
  readonly b13?: readonly Matrix[];
  readonly b2?: Matrix;
  readonly transposed: boolean;
  readonly order: 'halves' | 'interleaved';
}

/** What a layer is and where its tensors lie. */
export interface LayerPlan {
  readonly architecture: string;
  readonly row: Architecture;
  readonly layer: number;
  /** `model.layers.1.mlp` */
  readonly block: string;
  readonly gate: GateRules;
  readonly swiglu: SwiGLU;
  readonly hidden: number;
  readonly intermediate: number;
  readonly experts: number;
  readonly zeroExperts: number;
  readonly dtype: FloatDType;
  readonly router: TensorInfo;
  readonly routerBias?: TensorInfo;
  readonly correctionBias?: TensorInfo;
  readonly routed: readonly MlpSource[];
  readonly shared?: {
    readonly mlp: MlpSource;
    readonly intermediate: number;
    readonly dtype: FloatDType;
    readonly count: number;
    readonly gate?: TensorInfo;
  };
}

/** What a plan is made from. */
export interface PlanSubject {
  readonly dir: string;
  readonly row: Architecture;
  readonly name: string;
  readonly config: Readonly<Record<string, unknown>>;
  readonly tensors: SafetensorsReader;
  readonly layer: number;
  readonly block: string;
  /** Names of the block's tensors. */
  readonly names: ReadonlySet<string>;
}

/**
 * What a layer is and where its weights lie.
 * @throws MoeError ERR_MOE_CHECKPOINT for tensors that are missing, misshapen or unaccounted for; ERR_MOE_UNSUPPORTED
 * for configuration values that no op here can do.
 */
export const planLayer = (subject: PlanSubject): Promise<LayerPlan> => new Planner(subject).plan();

/** Puts one layer together from its names and shapes. */
class Planner {
  readonly #config: ModelConfig;
  readonly #used = new Set<string>();

  constructor(readonly subject: PlanSubject) {
    this.#config = new ModelConfig(join(subject.dir, 'config.json'), subject.config, subject.layer);
  }

  async plan(): Promise<LayerPlan> {
    const { row, name, layer, block } = this.subject;
    const config = this.#config;
    config.word(keys.activation, ['silu', 'swish'], 'silu');
    const gate = row.gate(config);
    const router = await this.#router();
    const [columns, hidden] = router.shape;
    const experts = this.#countExperts(columns);
    this.#checkGate(gate, columns);
    const routerBias = row.routerBias ? await this.#vector(`${this.#routerName()}.bias`, columns) : undefined;
    const correctionBias =
      row.correctionBias === undefined
        ? undefined
        : await this.#vector(this.#only(row.correctionBias, 'correction bias'), columns);
    const routed = await this.#routed(experts, hidden);
    const intermediate = intermediateOf(routed[0]);
    const shared = await this.#shared(hidden);
    this.#checkNothingLeft();
    return {
      architecture: name,
      row,
      layer,
      block,
      gate,
      swiglu: row.swiglu?.(config) ?? {},
      hidden,
      intermediate,
      experts,
      zeroExperts: columns - experts,
      dtype: routed[0].w2.info.dtype as FloatDType,
      router,
      ...(routerBias && { routerBias }),
      ...(correctionBias && { correctionBias }),
      routed,
      ...(shared && { shared }),
    };
  }

  #fail(problem: string): never {
    throw checkpointError(`${this.subject.dir}: ${this.subject.block}: ${problem}`);
  }

  /** The tensor of a name relative to the block; its absence is an error. */
  async #tensor(relative: string, at: 'block' | 'layer' = 'block'): Promise<TensorInfo> {
    const name = this.#full(relative, at);
    if (!this.subject.tensors.has(name)) this.#fail(`tensor '${name}' is missing`);
    this.#used.add(name);
    const info = await this.subject.tensors.info(name);
    if (info.dtype !== 'f32' && info.dtype !== 'bf16' && info.dtype !== 'f16') {
      this.#fail(`tensor '${name}' is ${info.dtype}; weights must be f32, bf16 or f16`);
    }
    return info;
  }

  #full(relative: string, at: 'block' | 'layer'): string {
    return `${at === 'block' ? this.subject.block : this.subject.block.slice(0, this.subject.block.lastIndexOf('.'))}.${relative}`;
  }

  #has(relative: string, at: 'block' | 'layer' = 'block'): boolean {
    return this.subject.tensors.has(this.#full(relative, at));
  }

  /** The one spelling that is there; the first when none is, so that its absence is reported. */
  #only(spellings: readonly string[], what: string): string {
    const present = spellings.filter((spelling) => this.#has(spelling));
    if (present.length > 1) this.#fail(`has its ${what} twice: ${present.join(' and ')}`);
    return present[0] ?? spellings[0];
  }

  #routerName(): string {
    return this.#only(
      this.subject.row.routers.map((router) => `${router}.weight`),
      'router',
    ).replace(/\.weight$/, '');
  }

  async #router(): Promise<TensorInfo> {
    const info = await this.#tensor(`${this.#routerName()}.weight`);
    if (info.shape.length !== 2 || info.shape.includes(0)) {
      this.#fail(`expected router '${info.name}': [experts, hidden] but it is ${shapeOf(info)}`);
    }
    return info;
  }

  /** A vector of `length`; leading dimensions of 1 are dropped. */
  async #vector(relative: string, length: number): Promise<TensorInfo> {
    const info = await this.#tensor(relative);
    if (info.shape.at(-1) !== length || info.shape.slice(0, -1).some((dim) => dim !== 1)) {
      this.#fail(`expected '${info.name}': [${length}] but it is ${shapeOf(info)}`);
    }
    return info;
  }

  #countExperts(columns: number): number {
    const config = this.#config;
    const configured = config.optionalInteger(keys.experts);
    let experts = columns;
    if (this.subject.row.zeroExperts) {
      experts = configured ?? this.#fail('config.json does not say how many of the experts are real');
      const zero = config.integer(keys.zeroExperts, { fallback: columns - experts });
      if (experts < 1 || experts + zero !== columns) {
        this.#fail(
          `config.json has ${experts} experts and ${zero} zero experts but the router has ${columns} rows`,
        );
      }
    } else if (configured !== undefined && configured !== columns) {
      this.#fail(`config.json has ${configured} experts but the router has ${columns} rows`);
    }
    return experts;
  }

  #checkGate({ topK, groups, topGroups }: GateRules, columns: number): void {
    const unsupported = (what: string) => {
      throw new MoeError('ERR_MOE_UNSUPPORTED', `${this.subject.dir}: ${this.subject.block}: ${what}`, {
        op: 'checkpoint',
      });
    };
    if (columns > MAX_EXPERTS) unsupported(`${columns} experts; at most ${MAX_EXPERTS} are supported`);
    if (topK > MAX_TOP_K) unsupported(`${topK} experts per token; at most ${MAX_TOP_K} are supported`);
    if (columns % groups !== 0) this.#fail(`${columns} experts cannot be divided into ${groups} groups`);
    if (topGroups > groups) this.#fail(`config.json chooses ${topGroups} of ${groups} groups`);
    if (topK > (columns / groups) * topGroups) {
      this.#fail(`config.json chooses ${topK} experts of ${(columns / groups) * topGroups} eligible ones`);
    }
  }

  async #routed(experts: number, hidden: number): Promise<MlpSource[]> {
    const present = this.subject.row.experts.filter((layout) =>
      layout.kind === 'stacked'
        ? this.#has(layout.gateUp) || this.#has(layout.down)
        : this.#has(`experts.0.${layout.down}.weight`) || this.#has(`experts.0.${layout.gate}.weight`),
    );
    if (present.length > 1) this.#fail('holds its experts in two layouts');
    const layout = present[0] ?? this.subject.row.experts[0];
    const sources: MlpSource[] = [];
    if (layout.kind === 'stacked') sources.push(...(await this.#stack(layout, experts, hidden)));
    else for (let e = 0; e < experts; e++) sources.push(await this.#listed(layout, e, hidden));
    this.#checkAlike(sources);
    return sources;
  }

  async #listed({ gate, up, down }: ListedExperts, expert: number, hidden: number): Promise<MlpSource> {
    const parts = [gate, up, down].map((part) => `experts.${expert}.${part}`);
    return this.#separate([parts[0], parts[1]], parts[2], 'block', hidden);
  }

  /** An MLP of matrices [out, in], gate and up in one or two of them, with biases where there are any. */
  async #separate(
    gateUp: readonly string[],
    down: string,
    at: 'block' | 'layer',
    hidden: number,
  ): Promise<MlpSource> {
    const w13: Matrix[] = [];
    for (const name of gateUp) {
      const info = await this.#tensor(`${name}.weight`, at);
      const [rows, columns] = info.shape;
      const even = gateUp.length === 2 || rows % 2 === 0;
      if (info.shape.length !== 2 || columns !== hidden || rows < 1 || !even) {
        const expected = gateUp.length === 2 ? 'intermediate' : '2 * intermediate';
        this.#fail(`expected '${info.name}': [${expected}, ${hidden}] but it is ${shapeOf(info)}`);
      }
      w13.push({ info, firstRow: 0, rows, columns });
    }
    const intermediate = gateUp.length === 2 ? w13[0].rows : w13[0].rows / 2;
    const last = w13.at(-1)!;
    if (gateUp.length === 2 && last.rows !== intermediate) {
      this.#fail(
        `expected '${last.info.name}': [${intermediate}, ${hidden}] but it is ${shapeOf(last.info)}`,
      );
    }
    const info = await this.#tensor(`${down}.weight`, at);
    if (info.shape.length !== 2 || info.shape[0] !== hidden || info.shape[1] !== intermediate) {
      this.#fail(`expected '${info.name}': [${hidden}, ${intermediate}] but it is ${shapeOf(info)}`);
    }
    const w2 = { info, firstRow: 0, rows: hidden, columns: intermediate };
    const biased = [...gateUp, down].filter((name) => this.#has(`${name}.bias`, at));
    if (biased.length === 0) return { w13, w2, transposed: false, order: 'halves' };
    const b13: Matrix[] = [];
    for (const [i, name] of gateUp.entries()) b13.push(await this.#bias(`${name}.bias`, at, w13[i].rows));
    return {
      w13,
      w2,
      b13,
      b2: await this.#bias(`${down}.bias`, at, hidden),
      transposed: false,
      order: 'halves',
    };
  }

  async #bias(relative: string, at: 'block' | 'layer', length: number): Promise<Matrix> {
    const info = await this.#tensor(relative, at);
    if (info.shape.length !== 1 || info.shape[0] !== length) {
      this.#fail(`expected '${info.name}': [${length}] but it is ${shapeOf(info)}`);
    }
    return { info, firstRow: 0, rows: 1, columns: length };
  }

  async #stack(layout: StackedExperts, experts: number, hidden: number): Promise<MlpSource[]> {
    const { transposed, order } = layout;
    const gateUp = await this.#tensor(layout.gateUp);
    const down = await this.#tensor(layout.down);
    // A stack of zero experts' rows may follow the real ones in gate_up (longcat_flash); down has the real ones only.
    const stacked = this.subject.row.zeroExperts ? gateUp.shape[0] : experts;
    const intermediate = down.shape[transposed ? 1 : 2];
    const oriented = (rows: number, columns: number) => (transposed ? [columns, rows] : [rows, columns]);
    const expect = (info: TensorInfo, expected: readonly number[]) => {
      if (info.shape.length !== expected.length || info.shape.some((dim, axis) => dim !== expected[axis])) {
        const stored = transposed ? ' (stored [in, out])' : '';
        this.#fail(`expected '${info.name}': [${expected.join(', ')}]${stored} but it is ${shapeOf(info)}`);
      }
    };
    if (down.shape.length !== 3 || !(intermediate >= 1) || stacked < experts) {
      this.#fail(
        `expected '${down.name}' to hold ${experts} experts of hidden ${hidden} but it is ${shapeOf(down)}`,
      );
    }
    expect(down, [experts, ...oriented(hidden, intermediate)]);
    expect(gateUp, [stacked, ...oriented(2 * intermediate, hidden)]);
    const gateUpBias = await this.#stackedBias(layout.gateUpBias);
    const downBias = await this.#stackedBias(layout.downBias);
    if (gateUpBias !== undefined) expect(gateUpBias, [experts, 2 * intermediate]);
    if (downBias !== undefined) expect(downBias, [experts, hidden]);
    const slice = (info: TensorInfo, expert: number): Matrix => {
      const [rows, columns] = info.shape.length === 3 ? info.shape.slice(1) : [1, info.shape[1]];
      return { info, firstRow: expert * rows, rows, columns };
    };
    return Array.from({ length: experts }, (_, expert) => ({
      w13: [slice(gateUp, expert)],
      w2: slice(down, expert),
      ...(gateUpBias && downBias ? { b13: [slice(gateUpBias, expert)], b2: slice(downBias, expert) } : {}),
      transposed,
      order,
    }));
  }

  /** Biases of a stack belong to the architecture: where a row names them they must be there. */
  async #stackedBias(name: string | undefined): Promise<TensorInfo | undefined> {
    return name === undefined ? undefined : this.#tensor(name);
  }

  /** Packing writes all experts with one width and one dtype. */
  #checkAlike(sources: readonly MlpSource[]): void {
    const [first] = sources;
    for (const source of sources) {
      if (intermediateOf(source) !== intermediateOf(first)) {
        this.#fail(`experts differ in width: ${shapeOf(first.w2.info)} and ${shapeOf(source.w2.info)}`);
      }
      if ((source.b2 === undefined) !== (first.b2 === undefined)) this.#fail('only some experts have biases');
      for (const { info } of matricesOf(source)) {
        if (info.dtype !== first.w2.info.dtype) {
          this.#fail(
            `experts differ in dtype: '${first.w2.info.name}' is ${first.w2.info.dtype}, '${info.name}' ${info.dtype}`,
          );
        }
      }
    }
  }

  async #shared(hidden: number): Promise<LayerPlan['shared']> {
    const { shared, sharedGate, sharedByDefault = 0 } = this.subject.row;
    const config = this.#config;
    const fallback = typeof sharedByDefault === 'function' ? sharedByDefault(config) : sharedByDefault;
    // A key that is there but null says that there are none.
    const count = config.integer(keys.sharedExperts, {
      fallback: config.mentions(keys.sharedExperts) ? 0 : fallback,
    });
    if (shared === undefined) {
      if (count > 0)
        this.#fail(`config.json has ${count} shared experts, which ${this.subject.row.name} does not have`);
      return undefined;
    }
    const { at, gateUp, down } = shared;
    const present = [...gateUp, down].some((name) => this.#has(`${name}.weight`, at));
    if (count === 0) {
      if (present) this.#fail(`has shared experts but config.json says there are none`);
      return undefined;
    }
    const mlp = await this.#separate(gateUp, down, at, hidden);
    this.#checkAlike([mlp]);
    if (mlp.w2.columns % count !== 0) {
      this.#fail(
        `config.json has ${count} shared experts, but ${mlp.w2.columns} columns do not make that many`,
      );
    }
    const gate = sharedGate === undefined ? undefined : await this.#vector(`${sharedGate}.weight`, hidden);
    return {
      mlp,
      intermediate: mlp.w2.columns,
      dtype: mlp.w2.info.dtype as FloatDType,
      count,
      ...(gate && { gate }),
    };
  }

  #checkNothingLeft(): void {
    for (const name of this.subject.names) {
      if (this.#used.has(name) || this.subject.row.unused?.test(name.slice(this.subject.block.length + 1)))
        continue;
      this.#fail(`tensor '${name}' has no place in a layer of ${this.subject.row.name}`);
    }
  }
}

/** The width of one expert: the inner dimension of its down projection. */
export const intermediateOf = ({ w2, transposed }: MlpSource): number => (transposed ? w2.rows : w2.columns);

const matricesOf = ({ w13, w2, b13 = [], b2 }: MlpSource): readonly Matrix[] => [
  ...w13,
  w2,
  ...b13,
  ...(b2 === undefined ? [] : [b2]),
];

const shapeOf = ({ dtype, shape }: TensorInfo): string => `${dtype}[${shape.join(', ')}]`;
