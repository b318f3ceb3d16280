// What a report is, apart from how it is written: a title, the figures that sum it up, and pictures with the sentence
// that says what they show. Pictures are vega-lite specifications with their data inside.
import type { TopLevelSpec } from 'vega-lite';

export interface ReportPicture {
  heading: string;
  /** What to see in it, one or two sentences. */
  caption: string;
  spec: TopLevelSpec;
}

export interface Report {
  title: string;
  /** Label and value, in reading order. */
  summary: [label: string, value: string][];
  pictures: ReportPicture[];
  /** A closing table, header first. */
  table?: string[][];
}
