// What a report is, apart from how it is written: a title, the figures that sum it up, and pictures with the sentence
// that says what they show. Pictures are vega-lite specifications with their data inside.

/**
 * A vega-lite specification. Not vega-lite's own type, which needs the types of a browser in whoever uses this package.
 */
export type PictureSpec = Readonly<Record<string, unknown>>;

export interface ReportPicture {
  heading: string;
  /** What to see in it, one or two sentences. */
  caption: string;
  spec: PictureSpec;
}

export interface Report {
  title: string;
  /** What a reader has to know to read the figures, below the title. */
  lead?: string;
  /** Label and value, in reading order. */
  summary: [label: string, value: string][];
  pictures: ReportPicture[];
  /** A closing table, header first, and the sentence that says what its columns are. */
  table?: { caption: string; rows: string[][] };
}
