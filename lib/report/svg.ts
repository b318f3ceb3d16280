// Draws vega-lite pictures as SVG text, without a browser. vega is loaded on first use: a plan without a report never
// pays for it.
import type { TopLevelSpec } from 'vega-lite';
import type { PictureSpec } from './report.js';

/** The picture as one <svg> element. */
export async function renderSvg(spec: PictureSpec): Promise<string> {
  const [vega, vegaLite] = await Promise.all([import('vega'), import('vega-lite')]);
  const view = new vega.View(vega.parse(vegaLite.compile(spec as unknown as TopLevelSpec).spec), {
    renderer: 'none',
    logLevel: vega.Error,
  });
  try {
    return await view.toSVG();
  } finally {
    view.finalize();
  }
}

/** Text as it may stand in HTML or SVG. */
export function escapeMarkup(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}
