// Unpacks the quantised matrices of a graph to float32, once. On WebAssembly onnxruntime has no kernel for MatMulNBits:
// it unpacks the matrix again for every token, which takes ten times as long as multiplying. The numbers are the same.
//
// The graph is edited as bytes. ONNX files are protocol buffers: a message is a sequence of fields, each a number with a
// wire type, and a value. Numbers of fields are those of onnx.proto.

const LOCATION = "unpacked";
const [VARINT, BYTES] = [0, 2];
const MODEL = { graph: 7 };
const GRAPH = { node: 1, initializer: 5 };
const NODE = { input: 1, output: 2, name: 3, op_type: 4, attribute: 5, domain: 7 };
const ATTRIBUTE = { name: 1, i: 3, type: 20 };
const TENSOR = { dims: 1, data_type: 2, name: 8, raw_data: 9, external_data: 13, data_location: 14 };
const ENTRY = { key: 1, value: 2 };
const [FLOAT, INT, EXTERNAL] = [1, 2, 1]; // TensorProto.DataType, AttributeProto.AttributeType, TensorProto.DataLocation

/**
 * The graph and its external data [{path, data}] with float32 matrices in place of MatMulNBits. Both are returned as they
 * are if there is none, or if the matrices would take more than `most` bytes.
 */
export function unpacked(graph, data, most) {
  const model = [...fields(graph)];
  const body = model.find(({ number }) => number === MODEL.graph);
  const parts = [...fields(body.value)];
  const initializers = new Map(parts.filter(({ number }) => number === GRAPH.initializer).map(tensor));
  const nodes = parts.filter(({ number }) => number === GRAPH.node).map(node);
  const packed = new Map(nodes.filter(isPacked).map((each) => [each.inputs[1], each]));
  const size = [...packed.values()].reduce((sum, { sizes }) => sum + 4 * sizes.K * sizes.N, 0);
  if (!size || size > most) return { graph, data };

  const content = new ArrayBuffer(size);
  const added = [];
  let offset = 0;
  for (const [codes, { inputs, sizes }] of packed) {
    const matrix = new Float32Array(content, offset, sizes.K * sizes.N); // [N, K]
    fill(matrix, sizes, bytesOf(initializers.get(codes), data), scalesOf(initializers.get(inputs[2]), data));
    added.push(field(GRAPH.initializer, external(`${codes}.float`, [sizes.N, sizes.K], offset, matrix.byteLength)));
    offset += matrix.byteLength;
  }
  const edited = nodes.map((each) => (isPacked(each) ? multiplied(each) : { written: [each.part.whole], used: each.inputs }));
  const used = new Set(edited.flatMap((each) => each.used));
  const kept = parts.filter(({ number, value }) => {
    if (number === GRAPH.initializer) return used.has(tensor({ value })[0]);
    return number !== GRAPH.node;
  });
  const inside = joined([...edited.flatMap(({ written }) => written), ...kept.map(({ whole }) => whole), ...added]);
  const others = model.filter(({ number }) => number !== MODEL.graph).map(({ whole }) => whole);
  return {
    graph: joined([...others, field(MODEL.graph, inside)]),
    data: [...data, { path: LOCATION, data: new Uint8Array(content) }],
  };
}

/** Symmetric quantisation without group index, as gptconvert writes it. */
const isPacked = ({ operator, inputs }) => operator === "MatMulNBits" && !inputs[3] && !inputs[4];

/** Codes [N, blocks, bytes] and scales [N, blocks] → matrix [N, K]. */
function fill(matrix, { K, N, bits, block_size: block }, codes, scales) {
  const blocks = Math.ceil(K / block);
  const zero = 1 << (bits - 1);
  const mask = (1 << bits) - 1;
  const perByte = 8 / bits;
  let at = 0;
  for (let row = 0; row < N * blocks; row++) {
    const scale = scales[row];
    const count = Math.min(block, K - (row % blocks) * block); // the last block of a row is padded
    let byte = (row * block) / perByte;
    for (let done = 0; done < count; byte++) {
      for (let shift = 0; shift < 8 && done < count; shift += bits, done++) {
        matrix[at++] = (((codes[byte] >> shift) & mask) - zero) * scale;
      }
    }
  }
}

/** MatMulNBits as a multiplication by the transposed matrix, and an addition if it has a bias. */
function multiplied({ inputs: [left, codes, , , , bias], outputs: [output] }) {
  const matrix = `${codes}.float`;
  const product = bias ? `${output}.product` : output;
  const written = [field(GRAPH.node, operation("FusedMatMul", [left, matrix], product, "com.microsoft", { transB: 1 }))];
  if (bias) written.push(field(GRAPH.node, operation("Add", [product, bias], output)));
  return { written, used: bias ? [left, bias] : [left] };
}

// ---- Reading messages ----------------------------------------------------------------------------------------------

/** The fields of a message: {number, value, whole}, whole being the bytes with the number. */
function* fields(bytes) {
  for (let at = 0; at < bytes.length; ) {
    const start = at;
    let tag, value;
    [tag, at] = varint(bytes, at);
    const wire = tag & 7;
    if (wire === VARINT) [value, at] = varint(bytes, at);
    else if (wire === BYTES) {
      const [length, from] = varint(bytes, at);
      value = bytes.subarray(from, from + length);
      at = from + length;
    } else at += wire === 1 ? 8 : 4;
    yield { number: Math.trunc(tag / 8), value, whole: bytes.subarray(start, at) };
  }
}

function varint(bytes, at) {
  let [value, factor] = [0, 1];
  for (; bytes[at] & 128; at++, factor *= 128) value += (bytes[at] & 127) * factor;
  return [value + bytes[at] * factor, at + 1];
}

const text = (bytes) => new TextDecoder().decode(bytes);
const all = (message, number) => [...fields(message)].filter((each) => each.number === number).map(({ value }) => value);

function node(part) {
  const attributes = all(part.value, NODE.attribute).map((each) => [text(all(each, ATTRIBUTE.name)[0]), all(each, ATTRIBUTE.i)[0]]);
  return {
    part,
    operator: text(all(part.value, NODE.op_type)[0]),
    inputs: all(part.value, NODE.input).map(text),
    outputs: all(part.value, NODE.output).map(text),
    sizes: Object.fromEntries(attributes),
  };
}

function tensor({ value }) {
  return [text(all(value, TENSOR.name)[0]), value];
}

/** The bytes of an initializer, inside the graph or in a file. */
function bytesOf(message, data) {
  const [raw] = all(message, TENSOR.raw_data);
  if (raw) return raw;
  const entries = all(message, TENSOR.external_data).map((each) => [ENTRY.key, ENTRY.value].map((number) => text(all(each, number)[0])));
  const { location, offset = 0, length } = Object.fromEntries(entries);
  const file = data.find(({ path }) => path === location).data;
  return file.subarray(Number(offset), Number(offset) + Number(length));
}

/** Scales, copied because float32 must be aligned. */
const scalesOf = (message, data) => new Float32Array(bytesOf(message, data).slice().buffer);

// ---- Writing messages ----------------------------------------------------------------------------------------------

function operation(operator, inputs, output, domain = "", attributes = {}) {
  return joined([
    ...inputs.map((each) => field(NODE.input, each)),
    field(NODE.output, output),
    field(NODE.op_type, operator),
    ...Object.entries(attributes).map(([name, i]) =>
      field(NODE.attribute, joined([field(ATTRIBUTE.name, name), field(ATTRIBUTE.i, i), field(ATTRIBUTE.type, INT)])),
    ),
    ...(domain ? [field(NODE.domain, domain)] : []),
  ]);
}

function external(name, dims, offset, length) {
  const entries = Object.entries({ location: LOCATION, offset, length });
  return joined([
    ...dims.map((each) => field(TENSOR.dims, each)),
    field(TENSOR.data_type, FLOAT),
    field(TENSOR.name, name),
    ...entries.map(([key, value]) =>
      field(TENSOR.external_data, joined([field(ENTRY.key, key), field(ENTRY.value, String(value))])),
    ),
    field(TENSOR.data_location, EXTERNAL),
  ]);
}

/** A field: an integer, a text, or bytes. */
function field(number, value) {
  if (typeof value === "number") return joined([written(8 * number + VARINT), written(value)]);
  const bytes = typeof value === "string" ? new TextEncoder().encode(value) : value;
  return joined([written(8 * number + BYTES), written(bytes.length), bytes]);
}

function written(value) {
  const bytes = [];
  for (; value > 127; value = Math.trunc(value / 128)) bytes.push((value % 128) + 128);
  return Uint8Array.of(...bytes, value);
}

function joined(parts) {
  const bytes = new Uint8Array(parts.reduce((sum, each) => sum + each.length, 0));
  let at = 0;
  for (const each of parts) {
    bytes.set(each, at);
    at += each.length;
  }
  return bytes;
}
