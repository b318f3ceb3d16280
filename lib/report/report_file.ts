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
const lineLength = 140;

/** Words in lines of at most `lineLength` characters: SVG breaks no lines. */
function linesOf(text: string): string[] {
  const lines: string[] = [];
  for (const word of text.split(' ')) {
    const last = lines.at(-1);
    if (last !== undefined && last.length + 1 + word.length <= lineLength)
      lines[lines.length - 1] = `${last} ${word}`;
    else lines.push(word);
  }
  return lines;
}

/** The figures and all pictures in one SVG, one below the other, each under its heading. */
export async function renderReportSvg(report: Report): Promise<string> {
  const parts: string[] = [];
  let top = margin;
  let width = 0;
  const write = (text: string, size: number, look: string, left = margin): void => {
    parts.push(
      `<text x="${left}" y="${top + size}" font-family="sans-serif" font-size="${size}" ${look}>${escapeMarkup(text)}</text>`,
    );
  };
  const paragraph = (text: string, size: number, look: string): void => {
    for (const line of linesOf(text)) {
      write(line, size, look);
      top += Math.round(1.4 * size);
    }
  };
  paragraph(report.title, 20, 'font-weight="bold"');
  if (report.lead !== undefined) paragraph(report.lead, 13, 'fill="#4a5360"');
  for (const [label, value] of report.summary) {
    write(label, 13, 'fill="#4a5360"');
    write(value, 13, '', margin + 260);
    top += 20;
  }
  for (const { heading, caption, spec } of report.pictures) {
    top += margin;
    paragraph(heading, 16, 'font-weight="bold"');
    paragraph(caption, 13, 'fill="#4a5360"');
    const svg = await renderSvg(spec);
    const size = /<svg[^>]*?\swidth="([\d.]+)"[^>]*?\sheight="([\d.]+)"/.exec(svg);
    if (size === null)
      throw new MoeError('ERR_MOE_INTERNAL', 'expected the picture to state its width and height', {
        op: 'report',
      });
    parts.push(svg.replace('<svg ', `<svg x="${margin}" y="${top}" `));
    width = Math.max(width, Number(size[1]) + 2 * margin);
    top += Number(size[2]) + margin;
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
