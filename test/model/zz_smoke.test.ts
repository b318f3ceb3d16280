import { readdirSync } from 'node:fs';
import { test } from 'vitest';
import { createContext } from '/work/main/lib/index.js';
import { MoeLayer } from '/work/main/lib/model/layer.js';
import { Checkpoint } from '/work/main/lib/model/checkpoint.js';
import { readRecording } from '/work/main/lib/model/recording.js';
const root = process.env.ROOT ?? '/work/main/test/fixtures/hf';
test('smoke', async () => {
  for (const backend of (process.env.BACKENDS ?? 'oracle').split(',')) {
  const context = await createContext({ backend: backend as any });
  for (const dir of readdirSync(root)) {
    for (const fuse of ['auto','off'] as const) {
    try {
      const cp = await Checkpoint.open(`${root}/${dir}`);
      for (const n of cp.moeLayers) {
      const layer = await MoeLayer.load(cp, { layer: n, context, fuseSharedExperts: fuse });
      const rec = (await readRecording(`${root}/${dir}/moe_io.safetensors`, layer.description.block));
      if (!rec) { console.log(dir, n, 'no recording'); continue; }
      const x = context.tensor('f32', [rec.input.tokens, rec.input.hidden], rec.input.data);
      const { output, ids } = layer.forward(x, { returnRouting: true, part: layer.description.recordedPart });
      const got = await output.read(); const gi = await ids.read() as Int32Array;
      let d = 0, s = 0; got.forEach((v, i) => { d += (v - rec.output!.data[i]) ** 2; s += rec.output!.data[i] ** 2; });
      const k = layer.description.topK, c = ids.shape[1];
      let same: any = null;
      if (rec.ids) { same = true; for (let t = 0; t < rec.input.tokens; t++) { const a = [...gi.slice(t*c, t*c+k)].sort().join(); const b = [...rec.ids.data.slice(t*k, t*k+k)].sort().join(); if (a !== b) same = false; } }
      console.log(backend, dir, n, fuse, String(layer), Math.sqrt(d / s).toExponential(2), 'ids', same, layer.description.unfusedReason ?? '');
      layer.dispose();
      }
      await cp.close();
    } catch (e: any) { console.log(dir, fuse, e.code, e.message, e.code ? '' : e.stack); }
  }}
  console.log(context.memory());
  await context.close(); }
}, 600000);
