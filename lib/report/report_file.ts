// Writes a report in the form its file name asks for.
import { writeFile } from 'node:fs/promises';
import { extname } from 'node:path';
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { renderHtml } from './html.js';
import type { Report } from './report.js';
import { escapeMarkup, renderSvg } from './svg.js';

const check = new Arguments('report');

const margin = 16;
const headingHeight = 34;

/** All pictures in one SVG, one below the other, each under its heading. */
export async function renderReportSvg(report: Report): Promise<string> {
  const parts: string[] = [];
  let top = margin;
  let width = 0;
  for (const { heading, spec } of report.pictures) {
    const svg = await renderSvg(spec);
    const size = /<svg[^>]*?\swidth="([\d.]+)"[^>]*?\sheight="([\d.]+)"/.exec(svg);
    if (size === null)
      throw new MoeError('ERR_MOE_INTERNAL', 'expected the picture to state its width and height', {
        op: 'report',
      });
    parts.push(
      `<text x="${margin}" y="${top + 20}" font-family="sans-serif" font-size="16" font-weight="bold">${escapeMarkup(heading)}</text>`,
    );
    parts.push(svg.replace('<svg ', `<svg x="${margin}" y="${top + headingHeight}" `));
    width = Math.max(width, Number(size[1]) + 2 * margin);
    top += headingHeight + Number(size[2]) + margin;
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="${width}" height="${top}" viewBox="0 0 ${width} ${top}">
<title>${escapeMarkup(report.title)}</title>
<rect width="100%" height="100%" fill="#fff"/>
${parts.join('\n')}
</svg>
`;
}

/** The text of a file that a report is written to: .html (one self-contained page) or .svg, by its name. */
export async function renderReport(file: string, report: Report): Promise<string> {
  checkReportFile(file);
  return extname(file).toLowerCase() === '.html' ? renderHtml(report) : renderReportSvg(report);
}

/** Throws ERR_MOE_INVALID_ARG for a name that ends in neither .html nor .svg. */
export function checkReportFile(file: string): void {
  if (['.html', '.svg'].includes(extname(check.text('file', file)).toLowerCase())) return;
  throw new MoeError(
    'ERR_MOE_INVALID_ARG',
    `expected a report file ending in .html or .svg but received ${file}`,
    { op: 'report', arg: 'file' },
  );
}

/** Writes a report, see `renderReport`. Throws ERR_MOE_CHECKPOINT if the file cannot be written. */
export async function writeReport(file: string, report: Report): Promise<void> {
  check.list('report.pictures', check.object('report', report).pictures);
  const text = await renderReport(file, report);
  try {
    await writeFile(file, text);
  } catch (cause) {
    throw new MoeError('ERR_MOE_CHECKPOINT', `${file}: cannot be written (${(cause as Error).message})`, {
      op: 'report',
      arg: 'file',
      cause,
    });
  }
}
