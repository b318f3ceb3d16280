// A report as one HTML file: pictures are inline SVG, style is inline, nothing is loaded from anywhere and no script
// runs, so it opens the same from a disk, a mail or an artefact store.
import type { Report } from './report.js';
import { escapeMarkup, renderSvg } from './svg.js';

const style = `
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; margin: 2rem auto; max-width: 1060px; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { margin: .2rem 0 .8rem; color: #4a5360; }
figure { margin: 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
@media screen and (max-width: 760px) { svg { max-width: none; } }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid #e3e7ec; }
th:first-child, td:first-child, #summary td { text-align: left; } #summary td:first-child { color: #4a5360; } .scroll { overflow-x: auto; }
`;

/** The whole page. */
export async function renderHtml(report: Report): Promise<string> {
  const pictures: string[] = [];
  for (const { heading, caption, spec } of report.pictures)
    pictures.push(
      `<section><h2>${escapeMarkup(heading)}</h2>\n<p>${escapeMarkup(caption)}</p>\n<figure role="img" aria-label="${escapeMarkup(heading)}">${await renderSvg(spec)}</figure></section>`,
    );
  const summary = report.summary
    .map(([label, value]) => `<tr><td>${escapeMarkup(label)}</td><td>${escapeMarkup(value)}</td></tr>`)
    .join('\n');
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escapeMarkup(report.title)}</title>
<style>${style}</style>
</head>
<body>
<h1>${escapeMarkup(report.title)}</h1>
${report.lead === undefined ? '' : `<p>${escapeMarkup(report.lead)}</p>`}
<table id="summary">
${summary}
</table>
${pictures.join('\n')}
${report.table === undefined ? '' : tableMarkup(report.table)}
</body>
</html>
`;
}

function tableMarkup({ caption, rows: [header = [], ...rows] }: NonNullable<Report['table']>): string {
  const line = (cells: string[], tag: string): string =>
    `<tr>${cells.map((cell) => `<${tag}>${escapeMarkup(cell)}</${tag}>`).join('')}</tr>`;
  return `<section><h2>Figures</h2>\n<p>${escapeMarkup(caption)}</p>\n<div class="scroll"><table id="figures">\n<thead>${line(header, 'th')}</thead>\n<tbody>\n${rows.map((row) => line(row, 'td')).join('\n')}\n</tbody></table></div></section>`;
}
