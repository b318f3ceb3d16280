// What --help says below the options.

/** A heading, then a name and what it means per line; continuation lines are indented like commander's. */
export function definitions(
  heading: string,
  rows: Iterable<readonly [name: string, meaning: string]>,
): string {
  const list = [...rows];
  const indent = Math.max(...list.map(([name]) => name.length)) + 4;
  const width = Math.max(40, (process.stdout.columns ?? 80) - indent);
  const lines = list.map(([name, meaning]) => {
    const wrapped = meaning.split(' ').reduce<string[]>((parts, word) => {
      const last = parts.at(-1);
      if (last !== undefined && last.length + word.length < width)
        parts[parts.length - 1] = `${last} ${word}`;
      else parts.push(word);
      return parts;
    }, []);
    return `  ${name.padEnd(indent - 2)}${wrapped.join(`\n${' '.repeat(indent)}`)}`;
  });
  return `\n${heading}:\n${lines.join('\n')}`;
}
