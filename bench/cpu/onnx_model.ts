// The ONNX file of one com.microsoft.MoE node, weights as inputs, so that onnxruntime can do the same layer: the few
// fields of the protobuf (onnx.proto3) that it needs, written by hand.

export interface MoeModel {
  readonly experts: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly topK: number;
}

function varint(value: number): number[] {
  return value < 128 ? [value] : [(value % 128) + 128, ...varint(Math.floor(value / 128))];
}
const integer = (field: number, value: number): number[] => [...varint(field * 8), ...varint(value)];
const bytes = (field: number, value: readonly number[]): number[] => [
  ...varint(field * 8 + 2),
  ...varint(value.length),
  ...value,
];
const text = (field: number, value: string): number[] => bytes(field, [...new TextEncoder().encode(value)]);
const float = (field: number, value: number): number[] => [
  ...varint(field * 8 + 5),
  ...new Uint8Array(Float32Array.of(value).buffer),
];

// AttributeProto: name 1, f 2, i 3, s 4, type 20 (1 float, 2 int, 3 string)
const floatAttribute = (name: string, value: number) =>
  bytes(5, [...text(1, name), ...float(2, value), ...integer(20, 1)]);
const intAttribute = (name: string, value: number) =>
  bytes(5, [...text(1, name), ...integer(3, value), ...integer(20, 2)]);
const textAttribute = (name: string, value: string) =>
  bytes(5, [...text(1, name), ...text(4, value), ...integer(20, 3)]);

/** ValueInfoProto of a float tensor; a string is a symbolic dimension. */
function value(name: string, shape: readonly (number | string)[]): number[] {
  const dims = shape.flatMap((dim) => bytes(1, typeof dim === 'string' ? text(2, dim) : integer(1, dim)));
  return [...text(1, name), ...bytes(2, bytes(1, [...integer(1, 1), ...bytes(2, dims)]))];
}

/** Softmax routing with renormalised weights, interleaved SwiGLU: inputs x, router, w1, w2; output y. */
export function moeModel({ experts, hidden, intermediate, topK }: MoeModel): Uint8Array {
  const node = [
    ...['x', 'router', 'w1', '', 'w2'].flatMap((name) => text(1, name)),
    ...text(2, 'y'),
    ...text(4, 'MoE'),
    ...floatAttribute('activation_alpha', 1),
    ...floatAttribute('activation_beta', 0),
    ...textAttribute('activation_type', 'swiglu'),
    ...intAttribute('k', topK),
    ...intAttribute('normalize_routing_weights', 1),
    ...intAttribute('swiglu_fusion', 1),
    ...text(7, 'com.microsoft'),
  ];
  const graph = [
    ...bytes(1, node),
    ...text(2, 'moe'),
    ...bytes(11, value('x', ['T', hidden])),
    ...bytes(11, value('router', ['T', experts])),
    ...bytes(11, value('w1', [experts, 2 * intermediate, hidden])),
    ...bytes(11, value('w2', [experts, hidden, intermediate])),
    ...bytes(12, value('y', ['T', hidden])),
  ];
  const opset = (domain: string, version: number) => bytes(8, [...text(1, domain), ...integer(2, version)]);
  return Uint8Array.from([
    ...integer(1, 9),
    ...bytes(7, graph),
    ...opset('', 18),
    ...opset('com.microsoft', 1),
  ]);
}
